"""The toolchains of the ten languages: located, prepared for speed, and checked in the sandbox before they are used.

The most expensive work that is the same for every program is done once a machine and kept: a precompiled header for
C++, an archive of the compiler's classes for Java, a build cache for Go.
"""

import hashlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from fusion.errors import UserError
from harness.evaluation.multipl_e.languages import LANGUAGES, Language, nonce_line
from harness.evaluation.sandbox import Program, Sandbox
from harness.runtime.programs import search_path, which
from harness.store.files import rename_durably
from harness.store.paths import SOURCE

JAVATUPLES = Path("/usr/share/java/javatuples.jar")
TYPESCRIPT = ".toolchain"  # where `make toolchains` puts the compiler, below the checkout

_NOT_PREPARED = Path()  # in place of the folder of what is prepared
_HEADER = "#include<assert.h>\n#include<bits/stdc++.h>\n"  # what every C++ prompt begins with
_JAVA_SAMPLE = """import java.util.*;
import java.util.stream.*;
import org.javatuples.*;
class Problem {
    static ArrayList<Long> squares(List<Long> numbers) {
        return numbers.stream().map(n -> n * n).sorted().collect(Collectors.toCollection(ArrayList::new));
    }
    public static void main(String[] args) {
    assert(squares(Arrays.asList(2l, 1l)).equals(new ArrayList<Long>(Arrays.asList(1l, 4l))));
    assert(Pair.with(1l, "a").equals(Pair.with(1l, "a")));
    }

}
"""
_GO_SAMPLE = """package sample_test

import (
    "testing"
    "fmt"
)

func TestSample(t *testing.T) {
    if fmt.Sprintf("%v", 1) != "1" {
        t.Errorf("not 1")
    }
}
"""
_RUBY_SAMPLE = """require 'test/unit'
class TestHumanEval < Test::Unit::TestCase
  def test_sample
    assert_equal(1, 1)
  end
end
"""
# Programs that pass: how each toolchain is tried.
_SAMPLES = {
    "cpp": f"{_HEADER}int main() {{\n    assert(std::vector<int>(1).size() == 1);\n}}\n",
    "go": _GO_SAMPLE,
    "java": _JAVA_SAMPLE,
    "js": "require('node:assert').equal(1, 1);",
    "php": "<?php\nif (1 !== 1) { throw new Exception('1'); }",
    "python": "assert 1 == 1",
    "r": "stopifnot(isTRUE(all.equal(1, 1)))",
    "rb": _RUBY_SAMPLE,
    "rs": "fn main() {\n    assert_eq!(vec![1].len(), 1);\n}\n",
    "ts": "declare var require: any;\nrequire('node:assert').equal(1, 1);",
}


@dataclass(frozen=True)
class Toolchain:
    """The commands of one language on this machine.

    `roots` are the folders that they read, `needs` the files without which no program can run.
    """

    language: Language
    version: str
    run: Sequence[str]
    compile: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    roots: Sequence[Path] = ()
    needs: Sequence[Path] = ()

    def program(self, text: str, watch: str) -> Program:
        """The program of that text, whose standard output is searched for `watch`."""
        return Program({self.language.file: text}, self.run, self.compile, self.env, watch)

    def lacking(self) -> Path | None:
        """A file of the toolchain that existed when it was located and does not exist any more; else None."""
        return next((path for path in self.needs if not path.exists()), None)

    def check(self, sandbox: Sandbox) -> None:
        """Raises UserError, with the remedy, unless a correct program passes in the sandbox."""
        nonce = secrets.token_hex(16)
        sample = _SAMPLES[self.language.name]
        outcome = sandbox.run(self.program(self.language.with_nonce(sample, sample, nonce), nonce_line(nonce)))
        if outcome.exit_code or not outcome.seen:
            said = (outcome.stderr or outcome.stdout).strip().partition("\n")[0] or f"exit status {outcome.exit_code}"
            raise _refused(self.language, f"its toolchain fails in the sandbox, {said}")


def find(name: str, cache: Path) -> Toolchain:
    """The toolchain of a language, prepared in the folder `cache`. Raises UserError with the way to install it."""
    return _FINDERS[name](LANGUAGES[name], cache)


def locate(name: str) -> Toolchain:
    """As `find`, without preparing anything: it tells the version, and programs cannot be run by it."""
    return _FINDERS[name](LANGUAGES[name], _NOT_PREPARED)


def available(
    names: Sequence[str], cache: Path, *, unsafe: bool = False
) -> tuple[dict[str, Toolchain], dict[str, str]]:
    """The toolchains that work, and the reason for every other, each checked once."""

    def tried(slot: int, name: str) -> Toolchain | str:
        try:
            toolchain = find(name, cache)
            with Sandbox(toolchain.roots, slot=slot, unsafe=unsafe) as sandbox:
                toolchain.check(sandbox)
        except UserError as error:
            return str(error)
        return toolchain

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        answers = dict(zip(names, pool.map(tried, range(len(names)), names), strict=True))
    found = {name: answer for name, answer in answers.items() if isinstance(answer, Toolchain)}
    return found, {name: answer for name, answer in answers.items() if isinstance(answer, str)}


def _refused(language: Language, why: str) -> UserError:
    return UserError(f"{language.title} is not run: {why} (`make toolchains`, or apt-get install {language.install}).")


def _which(language: Language, command: str) -> str:
    found = which(command)
    if found is None:
        raise _refused(language, f"{command} is not installed")
    return found


def _ask(language: Language, *command: str) -> list[str]:
    """The output lines of a tool, called where it is installed, since the command may be a version manager's shim.

    It does not run in the current folder: a shim may take from there which program it starts (`rust-toolchain.toml`).
    """
    env = {**os.environ, "PATH": search_path()}
    done = subprocess.run(
        command, cwd="/", env=env, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise _refused(language, f"`{' '.join(command)}` fails, {done.stderr.strip() or 'no answer'}")
    return lines


def _prepared(language: Language, cache: Path, version: str, make: Callable[[Path], None]) -> Path:
    """A folder that is made once for a version of a toolchain, beside its place, and renamed when complete."""
    from filelock import FileLock

    if cache is _NOT_PREPARED:
        return cache
    key = hashlib.sha256(f"{version}\n{_SAMPLES[language.name]}".encode()).hexdigest()[:16]
    folder = cache.resolve() / f"{language.name}-{key}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if folder.is_dir():
            return folder
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            make(beside)
            for path in (beside, *beside.rglob("*")):
                path.chmod(0o755 if path.is_dir() else 0o644)  # the sandbox reads them as nobody
            rename_durably(beside, folder)
            return folder
        except subprocess.CalledProcessError as error:
            said = error.stderr.decode("utf-8", "replace").strip().partition("\n")[0]
            raise _refused(language, f"its toolchain cannot be prepared, {said or error}") from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def _made(command: Sequence[str | Path], folder: Path, **env: str) -> None:
    env = {"PATH": search_path(), "LANG": "C.UTF-8", "HOME": str(folder), **env}
    subprocess.run(command, cwd=folder, env=env, check=True, capture_output=True)


def _cpp(language: Language, cache: Path) -> Toolchain:
    compiler = Path(_which(language, "g++")).resolve()
    version = _ask(language, str(compiler), "--version")[0]
    base = [str(compiler), "-std=c++17"]

    def make(folder: Path) -> None:
        (folder / "all.h").write_text(_HEADER, encoding="utf-8")
        _made([*base, "-x", "c++-header", "all.h", "-o", "all.h.gch"], folder)

    header = _prepared(language, cache, version, make) / "all.h"
    command = [*base, "-include", str(header), language.file, "-o", "program"]
    return Toolchain(
        language, version, ["./program"], command, roots=[compiler.parents[1], header.parent], needs=[compiler, header]
    )


def _go(language: Language, cache: Path) -> Toolchain:
    root, version = _ask(language, _which(language, "go"), "env", "GOROOT", "GOVERSION")
    go = Path(root).resolve() / "bin" / "go"
    env = {"GOENV": "off", "GOTOOLCHAIN": "local", "GOPROXY": "off"}
    # Without -v the output of a passing test is not shown; -count=1 keeps no results of tests.
    run = [str(go), "test", "-v", "-count=1", language.file]

    def make(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as work:
            (Path(work) / language.file).write_text(_GO_SAMPLE, encoding="utf-8")
            _made(run, Path(work), GOCACHE=str(folder), **env)

    built = _prepared(language, cache, version, make)
    return Toolchain(
        language, version, run, env={**env, "GOCACHE": str(built)}, roots=[go.parents[1], built], needs=[go, built]
    )


def _java(language: Language, cache: Path) -> Toolchain:
    compiler = Path(_which(language, "javac")).resolve()
    java = compiler.with_name("java")
    version = _ask(language, str(java), "--version")[0]
    if not JAVATUPLES.exists():
        raise _refused(language, f"{JAVATUPLES}, which its programs import, is missing")
    # A compiler that runs for half a second does not repay a second level of compilation.
    fast = ["-J-XX:TieredStopAtLevel=1", "-J-XX:+UseSerialGC", "-J-XX:-UsePerfData"]
    rest = ["-encoding", "UTF8", "-cp", str(JAVATUPLES), language.file]

    def make(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as work:
            (Path(work) / language.file).write_text(_JAVA_SAMPLE, encoding="utf-8")
            archive = f"-J-XX:ArchiveClassesAtExit={folder / 'javac.jsa'}"
            _made([compiler, archive, *fast, *rest], Path(work))

    archive = _prepared(language, cache, version, make) / "javac.jsa"
    return Toolchain(
        language,
        version,
        [str(java), "-XX:+UseSerialGC", "-XX:-UsePerfData", "-Xmx1g", "-ea", "-cp", f".:{JAVATUPLES}", "Problem"],
        [str(compiler), f"-J-XX:SharedArchiveFile={archive}", *fast, *rest],
        roots=[java.parents[1], archive.parent, *Path("/etc").glob("java*")],
        needs=[java, compiler, archive, JAVATUPLES],
    )


def _node(language: Language) -> tuple[Path, str]:
    path, version = _ask(language, _which(language, "node"), "-p", r'process.execPath + "\n" + process.version')
    return Path(path).resolve(), f"node {version}"


def _js(language: Language, cache: Path) -> Toolchain:
    node, version = _node(language)
    return Toolchain(language, version, [str(node), language.file], roots=[node.parents[1]], needs=[node])


def _ts(language: Language, cache: Path) -> Toolchain:
    node, node_version = _node(language)
    # The native compiler itself: the script that npm links starts Node only to start it.
    native = list((SOURCE / TYPESCRIPT).glob("node_modules/@typescript/*/lib/tsc"))
    compiler = (native[0] if native else Path(_which(language, "tsc"))).resolve()
    version = _ask(language, str(compiler), "--version")[0]
    # Not strict: the rows were made for compilers whose default that was, and version 7's default refuses some.
    command = [str(compiler), "--target", "esnext", "--strict", "false", language.file]
    return Toolchain(
        language,
        f"TypeScript {version}, {node_version}",
        [str(node), "program.js"],
        command,
        roots=[node.parents[1], compiler.parents[1]],
        needs=[node, compiler],
    )


def _php(language: Language, cache: Path) -> Toolchain:
    path, version = _ask(language, _which(language, "php"), "-r", r'echo PHP_BINARY, "\n", PHP_VERSION;')
    php = Path(path).resolve()
    return Toolchain(
        language,
        f"PHP {version}",
        [str(php), language.file],
        roots=[php.parents[1], *Path("/etc").glob("php")],
        needs=[php],
    )


def _python(language: Language, cache: Path) -> Toolchain:
    """The system's interpreter of the harness's Python version, which starts fastest, else the harness's own."""
    system = shutil.which(f"python3.{sys.version_info.minor}", path="/usr/local/bin:/usr/bin")
    python = Path(system or str(getattr(sys, "_base_executable", sys.executable))).resolve()
    prefix, version = _ask(language, str(python), "-I", "-c", "import sys; print(sys.prefix, sys.version, sep='\\n')")[
        :2
    ]
    run = [str(python), "-I", language.file]  # without the user's packages
    return Toolchain(language, f"Python {version}", run, roots=[Path(prefix)], needs=[python])


def _r(language: Language, cache: Path) -> Toolchain:
    home, version = _ask(
        language, _which(language, "Rscript"), "--vanilla", "-e", r'cat(R.home(), R.version.string, sep = "\n")'
    )
    script = Path(home).resolve() / "bin" / "Rscript"
    return Toolchain(
        language,
        version,
        [str(script), language.file],
        roots=[script.parents[1], *Path("/etc").glob("R")],
        needs=[script],
    )


def _rb(language: Language, cache: Path) -> Toolchain:
    # RubyGems takes half of the time of a program. Instead the gems that come with Ruby are put on the path, but for
    # power_assert, which is used only by assertions that no row has.
    ask = (
        "puts RbConfig.ruby, RUBY_VERSION; puts Gem::Specification.reject { |s| s.default_gem? || "
        "%w[power_assert rubygems-update].include?(s.name) }.flat_map(&:full_require_paths)"
    )
    path, version, *libraries = _ask(language, _which(language, "ruby"), "-e", ask)
    ruby = Path(path).resolve()
    include = [f"-I{library}" for library in libraries if Path(library).is_relative_to(ruby.parents[1])]
    return Toolchain(
        language,
        f"Ruby {version}",
        [str(ruby), "--disable-gems", *include, language.file],
        roots=[ruby.parents[1]],
        needs=[ruby],
    )


def _rs(language: Language, cache: Path) -> Toolchain:
    root = Path(_ask(language, _which(language, "rustc"), "--print", "sysroot")[0]).resolve()
    compiler = root / "bin" / "rustc"
    version = _ask(language, str(compiler), "--version")[0]
    command = [str(compiler), language.file, "-o", "program"]
    return Toolchain(language, version, ["./program"], command, roots=[root], needs=[compiler])


_FINDERS: dict[str, Callable[[Language, Path], Toolchain]] = {
    "cpp": _cpp,
    "go": _go,
    "java": _java,
    "js": _js,
    "php": _php,
    "python": _python,
    "r": _r,
    "rb": _rb,
    "rs": _rs,
    "ts": _ts,
}
