"""Files of compiled artifacts: nothing lost, nothing believed that should not be."""

from __future__ import annotations

import json
import multiprocessing
import os
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from fluxfire.passes.shared import artifact_file
from fluxfire.passes.shared.artifact_file import ArchiveError, Payload

ANY_FOLDER = settings(
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
words = st.text(max_size=12).filter(str.isprintable)
payloads = st.builds(
    Payload,
    fingerprint=st.dictionaries(words, words, max_size=4),
    sizes=st.lists(words, max_size=3, unique=True).map(sorted).map(tuple),
    seconds=st.floats(0, 1e6),
    made=words,
    blob=st.binary(max_size=200),
    keys=st.lists(words, max_size=3, unique=True).map(sorted).map(tuple),
)
ONE = Payload({"torch": "2.13"}, ("64+64+24",), 12.5, "2026-11-23T05:00:00+00:00", b"compiled" * 20)
TWO = Payload({"torch": "2.14"}, ("96+96+24",), 3.25, "2026-11-24T05:00:00+00:00", b"others" * 9)
KEYS = st.sampled_from([None, b"secret"])


@pytest.fixture
def file(tmp_path):
    return tmp_path / "kontext.megacache"


@ANY_FOLDER
@given(st.lists(payloads, min_size=1, max_size=4, unique_by=lambda p: str(p.fingerprint)), KEYS)
def test_what_was_added_is_read(tmp_path_factory, some, key):
    file = tmp_path_factory.mktemp("round") / "m"
    for payload in some:
        artifact_file.add(file, [payload], key)
    assert artifact_file.read(file, key) == tuple(some)


def test_the_header_can_be_read_without_us(file):
    artifact_file.add(file, [ONE], None)
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    envelope = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["fluxfire.megacache"])
    (facts,) = json.loads(envelope["header"])["payloads"]
    assert facts["fingerprint"] == {"torch": "2.13"}
    assert facts["sizes"] == ["64+64+24"]


def test_the_same_again_adds_only_its_sizes(file):
    artifact_file.add(file, [ONE, TWO], None)
    artifact_file.add(file, [Payload(ONE.fingerprint, ("1+1+1",), 1.0, "", ONE.blob)], None)
    first, second = artifact_file.read(file, None)
    assert first.sizes == ("1+1+1", "64+64+24")
    assert (first.seconds, second) == (ONE.seconds, TWO)


@ANY_FOLDER
@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_disbelieved(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("fuzz") / "m"
    file.write_bytes(data)
    for key in (None, b"secret"):
        with pytest.raises(ArchiveError):
            artifact_file.read(file, key)


@ANY_FOLDER
@given(st.data(), KEYS)
def test_damage_anywhere_is_found(tmp_path_factory, data, key):
    file = tmp_path_factory.mktemp("fuzz") / "m"
    artifact_file.add(file, [ONE, TWO], key)
    whole = bytearray(file.read_bytes())
    where = data.draw(st.integers(0, len(whole) - 1), "where")
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "overwrite"]), "kind")
    if kind == "flip":
        whole[where] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del whole[where:]
    elif kind == "insert":
        whole[where:where] = data.draw(st.binary(min_size=1, max_size=20))
    else:
        new = data.draw(st.binary(min_size=1, max_size=20))
        if whole[where : where + len(new)] == new:
            return
        whole[where : where + len(new)] = new
    file.write_bytes(whole)
    with pytest.raises(ArchiveError):
        artifact_file.read(file, key)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)


@ANY_FOLDER
@given(st.dictionaries(st.sampled_from(["header", "hmac-sha256", "sha256"]), json_values))
def test_headers_of_any_shape_are_disbelieved(tmp_path_factory, envelope):
    file = tmp_path_factory.mktemp("fuzz") / "m"
    marked = {"fluxfire.megacache": json.dumps(envelope)}
    file.write_bytes(save({"0": np.zeros(3, np.uint8)}, metadata=marked))
    with pytest.raises(ArchiveError):
        artifact_file.read(file, None)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it is empty"),
        (b"PK\x03\x04 something else entirely, and long enough", "truncated, or no megacache"),
        (save({"weight": np.zeros(3, np.float32)}), "it is no megacache"),
    ],
)
def test_foreign_files_are_named(file, data, words):
    file.write_bytes(data)
    with pytest.raises(ArchiveError, match=words):
        artifact_file.read(file, None)
    with pytest.raises(ArchiveError, match=words):
        artifact_file.add(file, [ONE], None)
    assert file.read_bytes() == data


def test_keys(file):
    artifact_file.add(file, [ONE], b"mine")
    assert artifact_file.read(file, b"mine") == (ONE,)
    with pytest.raises(ArchiveError, match="signed with another key than FLUXFIRE_MEGACACHE_"):
        artifact_file.read(file, b"yours")
    file.unlink()
    artifact_file.add(file, [ONE], None)
    with pytest.raises(ArchiveError, match="it is not signed, and FLUXFIRE_MEGACACHE_KEY is"):
        artifact_file.read(file, b"mine")


def test_files_that_others_can_write_need_a_signature(file):
    artifact_file.add(file, [ONE], b"mine")
    file.chmod(0o664)
    with pytest.raises(ArchiveError, match="it can be written by other users, who could chan"):
        artifact_file.read(file, None)
    assert artifact_file.read(file, b"mine") == (ONE,)
    file.chmod(0o600)
    file.parent.chmod(0o777)
    with pytest.raises(ArchiveError, match="its folder .* can be written by other users"):
        artifact_file.read(file, None)
    file.parent.chmod(0o1777)  # as /tmp: others cannot replace one's files
    assert artifact_file.read(file, None) == (ONE,)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_files_of_other_users_need_a_signature(file):
    artifact_file.add(file, [ONE], b"mine")
    os.chown(file, 12345, 12345)
    with pytest.raises(ArchiveError, match="it belongs to another user"):
        artifact_file.read(file, None)


def _add_many(file, first):
    for i in range(first, first + 20):
        artifact_file.add(file, [Payload({"n": str(i)}, (), 0.0, "", str(i).encode())], None)


def test_writers_at_the_same_time_lose_nothing(file, monkeypatch):
    # The last of them waits for all others, which may take a minute on a busy machine.
    monkeypatch.setattr(artifact_file, "_LOCK_SECONDS", 600)
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=_add_many, args=(file, first)) for first in (0, 20, 40)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert {p.fingerprint["n"] for p in artifact_file.read(file, None)} == set(map(str, range(60)))


STAGES = ["os.open", "os.fdopen", "os.fsync", "pathlib.Path.replace"]


def _add_and_die(file, stage, *, after):
    module, name = stage.rsplit(".", 1)
    owner = artifact_file.Path if module == "pathlib.Path" else getattr(artifact_file, module)
    plain = getattr(owner, name)

    def die(*arguments, **options):
        if after:
            plain(*arguments, **options)
        os._exit(9)

    setattr(owner, name, die)
    artifact_file.add(file, [TWO], None)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("after", [False, True])
def test_a_writer_that_is_killed_leaves_a_whole_file(file, stage, after):
    artifact_file.add(file, [ONE], None)
    fork = multiprocessing.get_context("fork")
    writer = fork.Process(target=_add_and_die, args=(file, stage), kwargs={"after": after})
    writer.start()
    writer.join()
    assert writer.exitcode == 9
    written = stage.endswith("replace") and after
    assert artifact_file.read(file, None) == ((ONE, TWO) if written else (ONE,))
    artifact_file.add(file, [TWO], None)
    assert artifact_file.read(file, None) == (ONE, TWO)
    assert not list(file.parent.glob(".*.part"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_leaves_the_old_file(file, stage, monkeypatch):
    artifact_file.add(file, [ONE], None)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stage, full)
    with pytest.raises(OSError, match="No space left"):
        artifact_file.add(file, [TWO], None)
    monkeypatch.undo()
    assert artifact_file.read(file, None) == (ONE,)


def test_equal_bytes_for_two_gpus_are_two_payloads(file):
    other = Payload({"torch": "2.13", "gpu": "H200"}, (), 1.0, "", ONE.blob)
    artifact_file.add(file, [ONE, other], None)
    assert artifact_file.read(file, None) == (ONE, other)


def test_without_a_key_a_signed_file_keeps_its_signature(file):
    artifact_file.add(file, [ONE], b"mine")
    file.chmod(0o600)
    with pytest.raises(ArchiveError, match="it is signed, and without FLUXFIRE_MEGACACHE_KEY"):
        artifact_file.add(file, [TWO], None)
    assert artifact_file.read(file, b"mine") == (ONE,)


@pytest.mark.parametrize("signature", ["é" * 64, "0" * 63, "x" * 64, 3, None])
def test_signatures_that_are_none(file, signature):
    file.write_bytes(artifact_file._bytes([ONE], artifact_file._header([ONE]), signature))
    file.chmod(0o600)
    with pytest.raises(ArchiveError, match="it is damaged"):
        artifact_file.read(file, b"mine")


def test_keys_are_any_bytes(monkeypatch):
    monkeypatch.setenv(artifact_file.KEY_VARIABLE, os.fsdecode(b"\xff\xfe key"))
    assert artifact_file.signing_key() == b"\xff\xfe key"
    monkeypatch.delenv(artifact_file.KEY_VARIABLE)
    assert artifact_file.signing_key() is None


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(
    ("key", "mask", "first"), [(None, 0o022, 0o600), (b"k", 0o022, 0o644), (b"k", 0o002, 0o664)]
)
def test_permissions(file, umask, key, mask, first):
    umask(mask)
    artifact_file.add(file, [ONE], key)
    assert file.stat().st_mode & 0o777 == first
    file.chmod(0o640)
    artifact_file.add(file, [TWO], key)
    assert file.stat().st_mode & 0o777 == 0o640


def test_a_folder_that_others_can_write_is_refused_before_anything_is_written(file):
    file.parent.chmod(0o775)
    for work in (artifact_file.read, lambda path, key: artifact_file.add(path, [ONE], key)):
        with pytest.raises(ArchiveError, match="its folder .* can be written by other users"):
            work(file, None)
    assert not file.exists()


def test_a_link_is_followed_and_stays(file, tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    file.symlink_to(tmp_path / "real" / "m")
    artifact_file.add(file, [ONE], None)
    artifact_file.add(file, [TWO], None)
    assert file.is_symlink()
    assert (
        artifact_file.read(tmp_path / "real" / "m", None)
        == artifact_file.read(file, None)
        == (ONE, TWO)
    )
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises((ArchiveError, OSError), match="back to itself|Too many levels"):
        artifact_file.read(loop, None)


def test_what_is_no_file_is_refused_at_once(file, tmp_path):
    os.mkfifo(file)
    with pytest.raises(ArchiveError, match="it is a pipe or a device, not a file"):
        artifact_file.read(file, None)
    with pytest.raises(IsADirectoryError):
        artifact_file.read(tmp_path, None)


def test_a_giant_is_not_read(file):
    with file.open("wb") as hollow:
        hollow.truncate(1 << 40)
    file.chmod(0o600)
    with pytest.raises(ArchiveError, match="1099511627776 bytes, more than any megacache has"):
        artifact_file.read(file, None)


@pytest.mark.parametrize("text", ["\x1b[2J", "\ud800", "a\nb"])
def test_texts_that_would_not_print_are_neither_written_nor_read(file, text):
    bad = Payload({"gpu": text}, (), 0.0, "", b"x")
    artifact_file.add(file, [ONE], None)
    with pytest.raises(ArchiveError, match="a text in it would not print"):
        artifact_file.add(file, [bad], None)
    assert artifact_file.read(file, None) == (ONE,)
    file.write_bytes(artifact_file._pack([bad], None))
    with pytest.raises(ArchiveError, match="a text in it would not print"):
        artifact_file.read(file, None)


def test_what_would_be_too_large_is_not_written(file, monkeypatch):
    artifact_file.add(file, [ONE], None)
    monkeypatch.setattr(artifact_file, "_LARGEST", len(file.read_bytes()))
    with pytest.raises(ArchiveError, match="delete it to start anew"):
        artifact_file.add(file, [TWO], None)
    assert artifact_file.read(file, None) == (ONE,)
    monkeypatch.setattr(artifact_file, "_LARGEST_HEADER", 100)
    with pytest.raises(ArchiveError, match="its header has [0-9]+ bytes"):
        artifact_file.read(file, None)


def test_what_a_file_says_cannot_command_a_terminal(file):
    header = json.dumps({"format": "\x1b[2J" + 1000 * "x", "payloads": []})
    file.write_bytes(artifact_file._bytes([], header, ""))
    file.chmod(0o600)
    with pytest.raises(ArchiveError, match="its format") as error:
        artifact_file.read(file, None)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 400


def test_a_payload_whose_keys_another_holds_is_left_out(file):
    whole = Payload({"gpu": "A"}, ("1+1+1",), 2.0, "", b"whole", ("graph a", "graph b"))
    part = Payload({"gpu": "A"}, ("2+2+2",), 1.0, "", b"part", ("graph b",))
    elsewhere = Payload({"gpu": "B"}, (), 1.0, "", b"part", ("graph b",))
    artifact_file.add(file, [whole], None)
    artifact_file.add(file, [part, elsewhere], None)
    first, second = artifact_file.read(file, None)
    assert (first.blob, first.sizes) == (b"whole", ("1+1+1", "2+2+2"))
    assert second == elsewhere


def test_a_look_at_a_file_that_would_not_be_used(file):
    artifact_file.add(file, [ONE], b"mine")
    file.chmod(0o666)
    assert artifact_file.peek(file) == (ONE,)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ArchiveError):
        artifact_file.peek(file)


def test_a_link_in_a_folder_of_others_is_refused(file, tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    artifact_file.add(tmp_path / "real" / "m", [ONE], None)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    link = tmp_path / "open" / "m"
    link.symlink_to(tmp_path / "real" / "m")
    with pytest.raises(ArchiveError, match="its folder .*open can be written by others|other"):
        artifact_file.read(link, None)


def test_only_its_own_left_overs_are_removed(tmp_path):
    parts = [tmp_path / f".{name}.{'0' * 32}.part" for name in ("a", "ab", "a.b", "[a]")]
    for part in parts:
        part.touch()
    artifact_file.add(tmp_path / "[a]", [ONE], None)
    assert [part.exists() for part in parts] == [True, True, True, False]
    artifact_file.add(tmp_path / "a", [ONE], None)
    assert [part.exists() for part in parts] == [False, True, True, False]
