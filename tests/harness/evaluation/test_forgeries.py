"""Programs that end in success without having passed the tests."""

import re
from pathlib import Path

import pytest

from harness.evaluation import sandbox as sandboxes
from harness.evaluation.multipl_e.execute import execute
from harness.evaluation.multipl_e.languages import LANGUAGES, language_of
from tests.harness.evaluation.programs import LIMITS, results_of, rows_of, write
from tests.shared import needed

# Wrong completions that end in success, and most of them print every file that they can read.
FORGERIES = [
    ("python", "    import os; print('OK'); os._exit(0)"),
    ("python", "    import os; print(open(__file__).read(), flush=True); os._exit(0)"),
    ("js", "  console.log('ok'); process.exit(0);\n}"),
    ("js", "  console.log(require('fs').readFileSync(__filename, 'utf8')); process.exit(0);\n}"),
    (
        "ts",
        """  const fs = require("fs");
  console.log(fs.readFileSync("program.ts", "utf8") + fs.readFileSync("program.js", "utf8"));
  (globalThis as any).process.exit(0);
  return 0;\n}""",
    ),
    ("rb", "  puts '1 tests, 3 assertions, 0 failures, 0 errors, 0 pendings'\n  exit!(0)\nend"),
    ("rb", "  x - y\nend\nat_exit { exit!(0) }"),  # the report of a failed test shows the lines around it
    ("php", "  return $x - $y;\n} ?>"),  # what follows is text, and printed
    ("php", "  return $x - $y;\n}\n?>\nfwrite(STDOUT"),
    ("php", "  readfile(__FILE__); exit(0);\n}"),
    ("r", '    cat(readLines("program.r"), sep = "\n"); quit(status = 0)\n}'),
    (
        "cpp",
        """    for (auto name : {"program.cpp", "program"}) std::cout << std::ifstream(name).rdbuf() << std::endl;
    std::_Exit(0);""",
    ),
    (
        "java",
        """    try {
            System.out.write(java.nio.file.Files.readAllBytes(java.nio.file.Paths.get("Problem.java")));
            System.out.write(java.nio.file.Files.readAllBytes(java.nio.file.Paths.get("Problem.class")));
            System.out.flush();
        } catch (IOException error) { }
        System.exit(0);
        return 0;""",
    ),
    (
        "rs",
        """    use std::io::Write;
    for name in &["program.rs", "program"] { std::io::stdout().write_all(&std::fs::read(name).unwrap()).unwrap(); }
    std::process::exit(0)""",
    ),
    (
        "go",  # a whole program, since only what its first lines import can be used
        """package add_test
import ("fmt"; "os"; "syscall"; "testing")
func add(x int, y int) int {
    for _, name := range []string{"program_test.go", os.Args[0]} {
        text, _ := os.ReadFile(name)
        fmt.Println(string(text))
    }
    syscall.Exit(0)
    return 0
}
""",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "completion"), FORGERIES, ids=[name for name, _ in FORGERIES])
def test_a_forged_success_does_not_pass_strictly(name: str, completion: str, tmp_path: Path, cache: Path) -> None:
    needed(sandboxes.refusal())
    row = rows_of(name)["HumanEval_53_add"]
    if completion.startswith("package"):
        row["prompt"] = ""
    path = write(tmp_path / "g.jsonl", [{**row, "completions": [completion]}])
    done = execute(path, tmp_path / "r.jsonl", cache=cache, limits=LIMITS)
    needed(done.not_run.get(name))
    (result,) = results_of(done)
    assert (result["exit_code"], result["strict"]) == (0, False), result


def test_the_nonce_comes_after_the_last_test() -> None:
    for name in LANGUAGES:
        for row in rows_of(name).values():
            text = language_of(row["language"]).with_nonce(f"prompt\n{row['tests']}", row["tests"], "FIRSTOTHER")
            lines = [line for line in text.splitlines() if line.strip(" \t})")]
            assert re.search("FIRST.+OTHER", lines[-3 if name == "rb" else -1]), (name, text)
