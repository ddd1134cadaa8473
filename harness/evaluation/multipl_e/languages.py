"""The ten languages: how a program is assembled, how it is scored, and which command runs it.

A completion passes by exit status (`exit_code == 0`), as in MultiPL-E, and passes strictly if it has also printed a
nonce by a statement after the last test, inside the function that holds the tests where the language requires that. A
completion that ends the program before the tests therefore does not pass strictly. A program that reads its own source
could still print the nonce: the check detects accidents, not fraud.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fusion.errors import UnknownName, UserError
from harness.evaluation.sandbox import Outcome

# By HumanEval's number: rows that cannot be solved as published. They stay in the denominator, so that numbers compare.
UNSOLVABLE = {"js": (51,), "php": (23,), "cpp": (137,), "go": (87,)}

_OTHER_NAMES = {"go_test.go": "go", "py": "python"}


@dataclass(frozen=True)
class Language:
    """One language: its file, its Debian packages, where the nonce goes and how a compile error is recognised."""

    name: str
    title: str
    file: str
    install: str
    nonce: str  # the statement that prints {}
    end: str | None = None  # a regular expression: the nonce goes before it, after everything without
    syntax_error: str | None = None  # what the output shows; None where the compiler's exit status tells

    def with_nonce(self, program: str, tests: str, nonce: str) -> str:
        """The program with a statement that prints `nonce` after the last test. Raises UserError where none fits."""
        statement = self.nonce.format(nonce)
        if self.end is None:
            return f"{program}\n{statement}\n"
        found = re.search(self.end, tests)
        if found is None:
            raise UserError(f"the tests do not end as MultiPL-E's for {self.title} do")
        at = len(program) - len(tests) + found.start()
        return f"{program[:at]}{statement}\n{program[at:]}"

    def status(self, outcome: Outcome) -> str:
        """MultiPL-E's word for how a program ended: OK, Timeout, SyntaxError or Exception."""
        if outcome.stopped == "time":
            return "Timeout"
        if outcome.exit_code == 0:
            return "OK"
        shown = self.syntax_error is not None and re.search(self.syntax_error, outcome.stdout + outcome.stderr)
        return "SyntaxError" if shown or not outcome.compiled else "Exception"


_LAST_BRACE = r"\}\s*\Z"
_LANGUAGES = (
    Language("cpp", "C++", "program.cpp", "g++", '    std::puts("{}"); std::fflush(stdout);', _LAST_BRACE),
    Language(
        "go", "Go", "program_test.go", "golang-go", '\tfmt.Println("{}")', _LAST_BRACE, r"\[(build|setup) failed\]"
    ),
    Language(
        "java",
        "Java",
        "Problem.java",
        "default-jdk-headless libjavatuples-java",
        '    System.out.println("{}");',
        r"\}\s*\}\s*\Z",
    ),
    Language(
        "js", "JavaScript", "program.js", "nodejs", ';globalThis.process.stdout.write("{}\\n");', None, "SyntaxError"
    ),
    Language("php", "PHP", "program.php", "php-cli", 'fwrite(STDOUT, "{}\\n");', None, "PHP Parse error"),
    Language("python", "Python", "program.py", "python3", '__import__("os").write(1, b"{}\\n")', None, "SyntaxError"),
    Language("r", "R", "program.r", "r-base-core", 'base::cat("{}\\n")', None, "Error: unexpected"),
    Language("rb", "Ruby", "program.rb", "ruby", '    STDOUT.puts "{}"', r"end\s+end\s*\Z", "syntax error"),
    Language("rs", "Rust", "program.rs", "rustc", '    println!("{}");', _LAST_BRACE),
    Language("ts", "TypeScript", "program.ts", "nodejs npm", ';(globalThis as any).process.stdout.write("{}\\n");'),
)
LANGUAGES = {language.name: language for language in _LANGUAGES}


def language_of(name: str) -> Language:
    """The language that a row names. Raises UserError with the nearest spelling."""
    name = _OTHER_NAMES.get(name, name)
    if name not in LANGUAGES:
        raise UnknownName("language", name, LANGUAGES)
    return LANGUAGES[name]


def cut(completion: str, stop_tokens: Sequence[str]) -> str:
    """The completion up to its first stop token, without that."""
    found = [at for token in stop_tokens if token and (at := completion.find(token)) >= 0]
    return completion[: min(found, default=len(completion))]


def program_of(prompt: str, completion: str, tests: str, stop_tokens: Sequence[str]) -> str:
    """Prompt, completion up to the first stop token, and tests, as one program."""
    return f"{prompt}{cut(completion, stop_tokens)}\n{tests}"
