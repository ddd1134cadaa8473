"""Forty programs that mean harm, four in each of the ten languages, and the limit that stops each."""

import os
import re
from pathlib import Path

import pytest

from harness.evaluation import sandbox as sandboxes
from harness.evaluation.multipl_e.languages import LANGUAGES
from harness.evaluation.multipl_e.toolchains import find
from harness.evaluation.sandbox import Limits, Sandbox
from tests.shared import needed

pytestmark = pytest.mark.slow

LIMITS = Limits(cpu=4, wall=30.0, memory=768 << 20, processes=64, disk=64 << 20)
# By the limit that stops a program: what it says where it is not the supervisor that stops it.
SAYS = {
    "time": "",
    "memory": r"(?i)memory|cannot allocate|bad_alloc|allocation failed",
    "disk": r"(?i)no space|ENOSPC|StorageFull|File size limit|possibly out of free disk space",
    "network": r"(?i)not permitted|EPERM|PermissionDenied|Unable to connect .*Unknown error",
    "files": r"(?i)no such file|cannot open|Read-only",
}

_CPP = "#include<assert.h>\n#include<bits/stdc++.h>\n#include<sys/socket.h>\nint main() {{ {} }}\n"
_GO = (
    'package x_test\nimport ("os"; "syscall"; "testing")\n'
    "func TestX(t *testing.T) {{ {}; _, _ = os.Args, syscall.EPERM }}\n"
)
_JAVA = (
    "import java.io.*;\nimport java.util.*;\n"
    "class Problem {{ public static void main(String[] a) throws Exception {{ {} }} }}\n"
)
_TS = "declare var require: any, Buffer: any;\nconst fs = require('fs'), net = require('net'); {}\n"
_JS = "const fs = require('fs'), net = require('net'); {}\n"
_NODE = {
    "time": "for (;;) {}",
    "memory": "const hoard = []; for (;;) hoard.push(Buffer.alloc(1 << 24, 1));",
    "disk": "for (let i = 0; ; i++) fs.writeFileSync('/tmp/' + i, Buffer.alloc(1 << 20, 1));",
    "network": "net.connect(80, '127.0.0.1');",
}
HOSTILE = {
    "cpp": {
        "time": _CPP.format("for (volatile long i = 0;; i++) {}"),
        "memory": _CPP.format("for (;;) memset(new char[1 << 24], 1, 1 << 24);"),
        "disk": _CPP.format(
            'for (int i = 0;; i++) { std::ofstream f("/tmp/" + std::to_string(i)); f << std::string(1 << 20, 1) << '
            'std::flush; if (!f) { perror("write"); return 1; } }'
        ),
        "network": _CPP.format('if (socket(AF_INET, SOCK_STREAM, 0) < 0) { perror("socket"); return 1; }'),
    },
    "go": {
        "time": _GO.format("for i := 0; i >= 0; i = (i + 1) & 1023 {}"),
        "memory": _GO.format(
            "var hoard [][]byte\nfor len(hoard) < 1 << 20 { b := make([]byte, 1 << 24)\n"
            "for i := range b { b[i] = 1 }\nhoard = append(hoard, b) }"
        ),
        "disk": _GO.format(
            "for i := 0; i < 1 << 20; i++ { err := os.WriteFile(string(rune(i + 1000)), make([]byte, 1 << 20), 0600)\n"
            "if err != nil { t.Fatal(err) } }"
        ),
        "network": _GO.format("_, err := syscall.Socket(2, 1, 0); if err != nil { t.Fatal(err) }"),
    },
    "java": {
        "time": _JAVA.format("for (long i = 0; i >= 0; i = (i + 1) & 1023) {}"),
        "memory": _JAVA.format("List<byte[]> hoard = new ArrayList<>(); for (;;) hoard.add(new byte[1 << 24]);"),
        "disk": _JAVA.format(
            'for (int i = 0; ; i++) try (OutputStream f = new FileOutputStream("/tmp/" + i)) '
            "{ f.write(new byte[1 << 20]); }"
        ),
        "network": _JAVA.format('new java.net.Socket("127.0.0.1", 80);'),
    },
    "js": {limit: _JS.format(code) for limit, code in _NODE.items()},
    "php": {
        "time": "<?php while (true) {}",
        "memory": "<?php ini_set('memory_limit', -1); while (true) { $hoard[] = str_repeat('x', 1 << 24); }",
        "disk": "<?php for ($i = 0; ; $i++) if (file_put_contents(\"/tmp/$i\", str_repeat('x', 1 << 20)) !== 1 << 20) "
        "exit(1);",
        "network": "<?php fsockopen('127.0.0.1', 80); exit(1);",
    },
    "python": {
        "time": "import os\nos.fork()\nwhile True: pass",
        "memory": "hoard = []\nwhile True: hoard.append(bytes(1 << 24) + b'x')",
        "disk": "for i in range(1 << 20): open(f'/tmp/{i}', 'wb').write(bytes(1 << 20))",
        "network": "import socket\nsocket.socket(40, socket.SOCK_STREAM)",  # AF_VSOCK, which reaches the host
    },
    "r": {
        "time": "repeat {}",
        "memory": "hoard <- list()\nrepeat hoard[[length(hoard) + 1]] <- runif(2e6)",
        "disk": "repeat if (system('dd if=/dev/zero of=$$ bs=1M count=8') != 0) quit(status = 1)",
        "files": "cat('x', file = '/usr/harm')",
    },
    "rb": {
        "time": "loop { }",
        "memory": "hoard = []\nloop { hoard << 'x' * (1 << 24) }",
        "disk": "(0..).each { |i| File.write(\"/tmp/#{i}\", 'x' * (1 << 20)) }",
        "network": "require 'socket'\nTCPSocket.new('127.0.0.1', 80)",
    },
    "rs": {
        "time": "fn main() { let mut i = 0u64; loop { i = i.wrapping_add(1); } }",
        "memory": "fn main() { let mut hoard = Vec::new(); loop { hoard.push(vec![1u8; 1 << 24]); } }",
        "disk": 'fn main() { for i in 0.. { std::fs::write(format!("/tmp/{}", i), vec![1u8; 1 << 20]).unwrap(); } }',
        "network": 'fn main() { std::net::TcpStream::connect("127.0.0.1:80").unwrap(); }',
    },
    "ts": {limit: _TS.format(code) for limit, code in _NODE.items()},
}
_CASES = [(name, limit) for name, programs in HOSTILE.items() for limit in programs]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "toolchains"


def test_there_are_forty() -> None:
    assert HOSTILE.keys() == LANGUAGES.keys()
    assert len(_CASES) == 40


@pytest.mark.parametrize(("name", "limit"), _CASES)
def test_a_hostile_program_is_stopped_by_its_limit(name: str, limit: str, cache: Path) -> None:
    needed(sandboxes.refusal())
    toolchain = find(name, cache)
    with Sandbox(toolchain.roots, LIMITS) as sandbox:
        outcome = sandbox.run(toolchain.program(HOSTILE[name][limit], "nonce"))
        assert outcome.compiled, outcome
        assert outcome.exit_code != 0, outcome
        if outcome.stopped:
            assert outcome.stopped == limit, outcome
        else:
            assert limit != "time" and re.search(SAYS[limit], outcome.stdout + outcome.stderr), outcome
        assert sandbox.run(toolchain.program("", "")).stopped == ""  # nothing is left that would disturb the next
