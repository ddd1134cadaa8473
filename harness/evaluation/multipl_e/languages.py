"""The ten languages: how a program is assembled, how it is scored, and which command runs it.

A completion passes by exit status (`exit_code == 0`), as in MultiPL-E, and passes strictly if it has also printed a
nonce, on a line of its own, by a statement after the last test, inside the function that holds the tests where the
language requires that. A completion that ends the program before the tests therefore does not pass strictly. No file
holds the nonce: the statement joins two halves at run time. So a program does not pass either by printing its source,
as PHP does with everything behind `?>` and Ruby with the lines of a failed test. A program written to deceive could
take its source apart and join the halves itself: a verdict is proof against accidents, not against fraud.
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
    nonce: str  # the statement that prints {0} and {1} as one line, after a line end; joined when it runs
    end: str | None = None  # a regular expression: the nonce goes before it, after everything without
    syntax_error: str | None = None  # what the output shows; None where the compiler's exit status tells

    def with_nonce(self, program: str, tests: str, nonce: str) -> str:
        """The program with a statement after the last test, which prints `nonce_line(nonce)`.

        Raises UserError where the tests have no place for it.
        """
        half = len(nonce) // 2
        statement = self.nonce.format(nonce[:half], nonce[half:])
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
    Language(
        "cpp",
        "C++",
        "program.cpp",
        "g++",
        r'    std::printf("\n%s%s\n", "{}", "{}"); std::fflush(stdout);',
        _LAST_BRACE,
    ),
    Language(
        "go",
        "Go",
        "program_test.go",
        "golang-go",
        r'	fmt.Printf("\n%s%s\n", "{}", "{}")',
        _LAST_BRACE,
        r"\[(build|setup) failed\]",
    ),
    Language(
        "java",
        "Java",
        "Problem.java",
        "default-jdk-headless libjavatuples-java",
        r'    System.out.println("\n{}".concat("{}"));',
        r"\}\s*\}\s*\Z",
    ),
    Language(
        "js",
        "JavaScript",
        "program.js",
        "nodejs",
        r';globalThis.process.stdout.write("\n{}" + "{}\n");',
        None,
        "SyntaxError",
    ),
    Language("php", "PHP", "program.php", "php-cli", r'fwrite(STDOUT, "\n{}" . "{}\n");', None, "PHP Parse error"),
    Language(
        "python",
        "Python",
        "program.py",
        "python3",
        r'__import__("os").write(1, b"\n{}" + b"{}\n")',
        None,
        "SyntaxError",
    ),
    Language("r", "R", "program.r", "r-base-core", r'base::cat("\n{}", "{}\n", sep = "")', None, "Error: unexpected"),
    Language("rb", "Ruby", "program.rb", "ruby", r'    STDOUT.puts "\n{}" + "{}"', r"end\s+end\s*\Z", "syntax error"),
    Language("rs", "Rust", "program.rs", "rustc", r'    println!("\n{{}}", ["{}", "{}"].concat());', _LAST_BRACE),
    Language(
        "ts", "TypeScript", "program.ts", "nodejs npm", r';(globalThis as any).process.stdout.write("\n{}" + "{}\n");'
    ),
)
LANGUAGES = {language.name: language for language in _LANGUAGES}


def original_name(problem: str) -> str:
    """What a problem is called in all languages: HumanEval_53 for HumanEval_53_add."""
    found = re.match(r"[^\d_]+_\d+(?=_|$)", problem)
    return found[0] if found else problem


def language_of(name: str) -> Language:
    """The language that a row names. Raises UserError with the nearest spelling."""
    name = _OTHER_NAMES.get(name, name)
    if name not in LANGUAGES:
        raise UnknownName("language", name, LANGUAGES)
    return LANGUAGES[name]


def nonce_line(nonce: str) -> str:
    """What the statement of `Language.with_nonce` prints: the nonce as a line of its own."""
    return f"\n{nonce}\n"


def cut(completion: str, stop_tokens: Sequence[str]) -> str:
    """The completion up to its first stop token, without that. For whoever writes completions: they are run whole."""
    found = [at for token in stop_tokens if token and (at := completion.find(token)) >= 0]
    return completion[: min(found, default=len(completion))]


def program_of(prompt: str, completion: str, tests: str) -> str:
    """Prompt, completion and tests as one program, as MultiPL-E's own evaluator puts them together."""
    return f"{prompt}{completion}\n{tests}"
