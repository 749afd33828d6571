"""Laws of the files of masks: what was written comes back, and nothing else is believed."""

from __future__ import annotations

import io
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import random
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from maskpro_lightning import NMPattern, export_sparse, load_compressed, load_masks, save_masks
from maskpro_lightning.files import archive
from maskpro_lightning.files.maskfiles import load_maskllm, save_maskllm

TWO_OF_FOUR = NMPattern(2, 4)
NAMES = ["w", "fc.weight", "../../escape", "/tmp/escape", "a:b", "", "é\n"]


def mask_of(*shape: int, input_dim: int = -1, pattern: NMPattern = TWO_OF_FOUR) -> Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    groups = pattern.group(mask, input_dim)
    groups[:] = pattern.top(pattern.group(random(*shape), input_dim))
    return mask


def masks_by_layer() -> dict[str, Tensor]:
    return {
        "linear": mask_of(6, 8),
        "conv1d": mask_of(8, 6, input_dim=0),
        "conv2d": mask_of(3, 8, 2, 2, input_dim=1),
        "experts": mask_of(2, 8, 3, input_dim=-2),
        "none": mask_of(0, 4),
        "vector": mask_of(4),
    }


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == mask.dtype and torch.equal(found[name], mask)
        for name, mask in expected.items()
    )


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


# --- our own ------------------------------------------------------------------------------------


def test_masks_are_read_as_they_were_written_whichever_dimension_groups_lie_along(
    tmp_path: Path,
) -> None:
    masks = masks_by_layer()
    save_masks(masks, TWO_OF_FOUR, tmp_path / "masks")
    assert equal(load_masks(tmp_path / "masks", TWO_OF_FOUR), masks)
    assert files(tmp_path) == ["masks"]


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "4:8", "8:16", "16:32"])
def test_any_pattern_is_kept(tmp_path: Path, pattern: str) -> None:
    nm = NMPattern.parse(pattern)
    masks = {"w": mask_of(5, 3 * nm.m, pattern=nm)}
    save_masks(masks, pattern, tmp_path / "masks")
    assert equal(load_masks(tmp_path / "masks", pattern), masks)


def test_a_2_4_mask_takes_at_most_0_68_bit_for_a_weight(tmp_path: Path) -> None:
    mask = mask_of(512, 512)
    save_masks({"w": mask}, TWO_OF_FOUR, tmp_path / "masks")
    with safe_open(tmp_path / "masks", "pt") as file:
        assert 8 * file.get_tensor("w").numel() / mask.numel() <= 0.68
    assert 8 * (tmp_path / "masks").stat().st_size / mask.numel() <= 0.68  # all of the file


def test_layouts_in_memory_do_not_matter(tmp_path: Path) -> None:
    mask = mask_of(6, 8)
    save_masks({"w": mask.T.contiguous().T}, TWO_OF_FOUR, tmp_path / "masks")
    assert equal(load_masks(tmp_path / "masks", TWO_OF_FOUR), {"w": mask})
    save_maskllm({"w": mask.T.contiguous().T}, tmp_path / "masks.npz")
    assert equal(load_maskllm(tmp_path / "masks.npz", {"w": (6, 8)}), {"w": mask})


@pytest.mark.parametrize("write", [save_masks, lambda m, _, path: save_maskllm(m, path)])
def test_a_name_is_never_a_path(tmp_path: Path, write: Any) -> None:
    masks = {name: mask_of(2, 4) for name in NAMES}
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "masks.npz"
    write(masks, TWO_OF_FOUR, path)
    shapes = {name: mask.shape for name, mask in masks.items()}
    own = write is save_masks
    found = load_masks(path, "2:4") if own else load_maskllm(path, shapes)
    assert equal(found, masks)
    assert files(tmp_path) == ["in", "masks.npz"]
    assert not Path("/tmp/escape").exists()


def test_a_mask_that_is_not_of_the_pattern_is_refused(tmp_path: Path) -> None:
    for mask in (torch.ones(4, 4), torch.eye(4), torch.zeros(()), torch.ones(2, 6)):
        message = (
            f"The mask of 'w', shape {tuple(mask.shape)}, keeps exactly 2 of every 4 along none "
            f"of its dimensions: it is no 2:4 mask."
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            save_masks({"w": mask.bool()}, TWO_OF_FOUR, tmp_path / "masks")
    assert files(tmp_path) == []


# --- MaskLLM's ----------------------------------------------------------------------------------


def test_a_file_made_by_hand_in_maskllms_format_is_read(tmp_path: Path) -> None:
    a = [[1, 1, 0, 0], [0, 1, 0, 1], [1, 0, 0, 1]]
    for save in (np.savez, np.savez_compressed):
        bits = np.array([0b1100_0101, 0b1001_0000], dtype=np.uint8)
        save(tmp_path / "masks.npz", **{"fc.weight.mask": bits, "other.mask": bits})
        found = load_maskllm(tmp_path / "masks.npz", {"fc.weight": (3, 4)})
        assert equal(found, {"fc.weight": torch.tensor(a).bool()})


def test_what_is_written_for_maskllm_is_its_format(tmp_path: Path) -> None:
    masks = masks_by_layer()
    save_maskllm(masks, tmp_path / "masks.npz")
    with np.load(tmp_path / "masks.npz", allow_pickle=False) as npz:
        assert set(npz.files) == {f"{name}.mask" for name in masks}
        for name, mask in masks.items():
            bits = np.unpackbits(npz[f"{name}.mask"])[: mask.numel()]
            assert bits.reshape(mask.shape).tolist() == mask.int().tolist()
    shapes = {name: mask.shape for name, mask in masks.items()}
    assert equal(load_maskllm(tmp_path / "masks.npz", shapes), masks)
    assert files(tmp_path) == ["masks.npz"]


def test_names_may_have_more_parts_in_front_than_in_the_file(tmp_path: Path) -> None:
    mask = mask_of(2, 4)
    save_maskllm({"layers.0.q.weight": mask, "q.weight": ~mask}, tmp_path / "masks.npz")
    found = load_maskllm(tmp_path / "masks.npz", {"model.model.layers.0.q.weight": (2, 4)})
    assert equal(found, {"model.model.layers.0.q.weight": mask})
    with pytest.raises(ValueError, match="two of the names asked for have the same end"):
        load_maskllm(tmp_path / "masks.npz", {"a.q.weight": (2, 4), "b.q.weight": (2, 4)})


class Executes:
    """Unpickled, it would write a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


def npz_with(entry: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive_:
        archive_.writestr("w.mask.npy", entry)
    return file.getvalue()


def npy(shape: str, descr: str = "'|u1'", data: bytes = b"\xcc\xc0", version: int = 1) -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    size = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + size + header + data


def objects() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([Executes()], dtype=object), allow_pickle=True)
    return file.getvalue()


WHOLE_NPZ = npz_with(npy("(2,)"))
HOSTILE_NPZ: dict[str, bytes] = {
    "empty": b"",
    "a pickle": pickle.dumps(Executes()),
    "a zip of pickled objects": npz_with(objects()),
    "an npy of a huge shape": npy("(10**15,)"),
    "a huge shape": npz_with(npy("(1000000000000000,)")),
    "a negative shape": npz_with(npy("(-1,)")),
    "another dtype": npz_with(npy("(2,)", "'<f8'")),
    "code for a header": npz_with(npy("__import__('pathlib').Path('executed').touch()")),
    "a long header": npz_with(npy("(2,)" + " " * 60_000)),
    "a header of gigabytes": npz_with(
        b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + b" " * 2**22, zipfile.ZIP_DEFLATED
    ),
    "a bomb": npz_with(npy("(2,)") + b"\0" * 2**26, zipfile.ZIP_DEFLATED),
    "LZMA": npz_with(npy("(2,)"), zipfile.ZIP_LZMA),
    "BZIP2": npz_with(npy("(2,)"), zipfile.ZIP_BZIP2),
    "no npy": npz_with(b"no array"),
    "too few bytes": npz_with(npy("(2,)", data=b"\xcc")),
    "bits beyond the last": npz_with(npy("(2,)", data=b"\xcc\xcf")),
    "not 2:4": npz_with(npy("(2,)", data=b"\xee\xc0")),
    "cut off": WHOLE_NPZ[:-1],
    "no dtype": npz_with(npy("(2,)", "()")),
    "an empty field": npz_with(npy("(2,)", "[()]")),
    "half a dtype": npz_with(npy("(2,)", "('|u1',)")),
    "a list for a key": npz_with(npy("(2,), []: 1")),
    "open brackets": npz_with(npy("(" * 3000)),
    "too deep": npz_with(npy("(2,)", "[" * 200 + "]" * 200)),
    "a quote": npz_with(npy("'")),
    "a dtype that is too large": npz_with(npy("(2,)", "'<U99999999999'")),
    "an array of arrays": npz_with(npy("(2,)", f"('|u1', {(2,) * 200})")),
}


@pytest.mark.parametrize("content", HOSTILE_NPZ.values(), ids=HOSTILE_NPZ)
def test_an_npz_that_is_not_masks_is_refused_and_nothing_of_it_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("masks.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"^'masks\.npz' is no"):
        load_maskllm("masks.npz", {"w": (3, 4)})
    assert files(tmp_path) == ["masks.npz"]


def test_a_mask_that_is_not_in_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "masks.npz").write_bytes(WHOLE_NPZ)
    with pytest.raises(ValueError, match=r"it holds no mask of 'fc\.weight', but 1 others"):
        load_maskllm(tmp_path / "masks.npz", {"fc.weight": (3, 4)})
    message = "'w.mask' is uint8 of shape (2,), but the bits of (5, 4) are uint8 of shape (3,)"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_maskllm(tmp_path / "masks.npz", {"w": (5, 4)})


def test_the_hand_made_npz_of_these_tests_is_itself_sound(tmp_path: Path) -> None:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        (tmp_path / "masks.npz").write_bytes(npz_with(npy("(2,)", data=b"\xcc\xc0"), method))
        found = load_maskllm(tmp_path / "masks.npz", {"w": (3, 4)})["w"]
        assert torch.equal(found, torch.tensor([[True, True, False, False]] * 3))


# --- what was changed is refused ----------------------------------------------------------------


def sound_npz(path: Path) -> None:
    save_maskllm({"w": mask_of(3, 4)}, path)


def sound_masks(path: Path) -> None:
    save_masks({"w": mask_of(3, 4)}, TWO_OF_FOUR, path)


def sound_compressed(path: Path) -> None:
    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.weight.masked_fill_(~mask_of(3, 4), 0)
    export_sparse(model, path.parent, file_format="compressed")
    (path.parent / "compressed.safetensors").rename(path)


READERS: dict[str, tuple[Callable[[Path], None], Callable[[Path], dict[str, Tensor]]]] = {
    "masks": (sound_masks, lambda path: load_masks(path, "2:4")),
    "compressed": (sound_compressed, load_compressed),
    "maskllm": (sound_npz, lambda path: load_maskllm(path, {"w": (3, 4)})),
}
every_reader = pytest.mark.parametrize("kind", READERS)


def refused(path: Path, content: bytes, kind: str, expected: dict[str, Tensor]) -> bool:
    """Whether a file is refused by name; one that is not must still hold the same."""
    path.write_bytes(content)
    try:
        found = READERS[kind][1](path)
    except ValueError as error:
        assert str(error).startswith(f"{str(path)!r} "), error  # noqa: PT017
        return True
    assert equal(found, expected)
    return False


@every_reader
def test_every_flipped_bit_is_refused_or_does_no_harm(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    READERS[kind][0](path)
    content, expected = path.read_bytes(), READERS[kind][1](path)
    accepted = []
    for place in range(8 * len(content)):
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        if not refused(path, bytes(changed), kind, expected):
            accepted.append(place)
    # A zip file holds dates and versions, of which no digest is kept; ours have none.
    assert len(accepted) < 4 * len(content) if kind == "maskllm" else accepted == []


@every_reader
def test_every_cut_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    READERS[kind][0](path)
    content, expected = path.read_bytes(), READERS[kind][1](path)
    for size in range(len(content)):
        assert refused(path, content[:size], kind, expected), size


@every_reader
@given(data=st.data())
@settings(deadline=None, derandomize=True, database=None, max_examples=200)
def test_a_file_with_other_bytes_is_refused_or_does_no_harm(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "file"
    READERS[kind][0](path)
    content, expected = path.read_bytes(), READERS[kind][1](path)
    start = data.draw(st.integers(0, len(content)))
    stop = data.draw(st.integers(start, len(content)))
    middle = data.draw(st.binary(max_size=64))
    changed = content[:start] + middle + content[stop:]
    assert refused(path, changed, kind, expected) or kind == "maskllm" or changed == content


@every_reader
@given(content=st.binary(max_size=200), head=st.sampled_from([b"", b"PK\3\4", b"\x93NUMPY\1\0"]))
@settings(deadline=None, derandomize=True, database=None, max_examples=200)
def test_any_bytes_are_refused(
    tmp_path_factory: pytest.TempPathFactory, kind: str, content: bytes, head: bytes
) -> None:
    assert refused(tmp_path_factory.mktemp("fuzz") / "file", head + content, kind, {})


# --- what lies about itself, with the right digest ----------------------------------------------

BYTES = torch.tensor([0, 0], dtype=torch.uint8)
FOUR = torch.zeros(8)
LIES: dict[str, tuple[str, dict[str, Tensor], dict[str, str]]] = {
    f"{kind}: {name}": (f"maskpro {kind}", tensors, {"pattern": "2:4"} | notes)
    for kind, name, tensors, notes in [
        *(
            ("masks 2", f"layouts {text[:30]}", {"w": BYTES}, {"layouts": text})
            for text in [
                "",
                "null",
                "[]",
                "[" * 100_000,
                "9" * 100_000,
                '{"w": null}',
                '{"w": [4, 4]}',
                '{"w": [[4, 4], 2]}',
                '{"w": [[4, 4], -1]}',
                '{"w": [[4, 4], true]}',
                '{"w": [[4, 3], 1]}',
                '{"w": [[4, -4], 1]}',
                '{"w": [[4, 4.0], 0]}',
                '{"w": [[1000000000000, 4], 1]}',
                '{"w": [[4611686018427387904, 4611686018427387904, 4], 2]}',
                '{"w": [[0, 4611686018427387904, 4611686018427387904, 4], 3]}',
                '{"w": [[1, 4], 1]}',
                '{"v": [[4, 4], 1]}',
                '{"w": [[4, 4], 1], "v": [[4, 4], 1]}',
            ]
        ),
        ("masks 2", "no layouts", {"w": BYTES}, {}),
        ("masks 2", "no word", {"w": BYTES + 216}, {"layouts": '{"w": [[4, 4], 1]}'}),
        ("masks 2", "floats", {"w": BYTES.float()}, {"layouts": '{"w": [[4, 4], 1]}'}),
        ("masks 2", "two dimensions", {"w": BYTES[None]}, {"layouts": '{"w": [[4, 4], 1]}'}),
        *(
            ("compressed 1", name, tensors, {"layouts": '{"w": [[4, 4], 1]}', "shared": shared})
            for name, tensors, shared in [
                ("no mask", {"kept:w": FOUR}, "{}"),
                ("no values", {"mask:w": BYTES}, "{}"),
                ("few values", {"mask:w": BYTES, "kept:w": FOUR[1:]}, "{}"),
                ("other values", {"mask:w": BYTES, "kept:w": FOUR.int()}, "{}"),
                ("twice", {"mask:w": BYTES, "kept:w": FOUR, "whole:w": FOUR}, "{}"),
                ("no place", {"mask:w": BYTES, "kept:w": FOUR, "other:w": FOUR}, "{}"),
                ("no layout", {"mask:w": BYTES, "kept:w": FOUR, "kept:v": FOUR}, "{}"),
                ("shared with none", {"mask:w": BYTES, "kept:w": FOUR}, '{"v": "u"}'),
                ("shared lists", {"mask:w": BYTES, "kept:w": FOUR}, '{"v": []}'),
                ("no list of shared", {"mask:w": BYTES, "kept:w": FOUR}, ""),
            ]
        ),
    ]
}


def write_lie(path: Path, lie: str) -> None:
    kind, tensors, notes = LIES[lie]
    archive.write({name: tensor.clone() for name, tensor in tensors.items()}, path, kind, notes)


def load_any(path: Path) -> Any:
    return load_compressed(path) if "compressed" in path.name else load_masks(path, "2:4")


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_contradicts_itself_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(LIES[lie][0].split()[1])
    write_lie(path, lie)
    with pytest.raises(ValueError, match=rf"^'{path}' is no (file of masks|compressed checkpoint)"):
        load_any(path)


@pytest.mark.parametrize(
    ("write", "problem"),
    [
        (lambda path: save_file({"w": BYTES}, path), "is not 'maskpro masks 2', it holds 'unnamed"),
        (lambda path: save_file({"w": BYTES}, path, {"format": "pt"}), "it holds 'pt'"),
        (
            lambda path: save_file({"w": BYTES}, path, {"format": "maskpro masks 1"}),
            "is not 'maskpro masks 2', it holds 'maskpro masks 1': write or download it again",
        ),
        (lambda path: path.write_bytes(b""), "is not a whole safetensors file"),
        (lambda path: path.write_bytes(b"\xff" * 8 + b"{}"), "is not a whole safetensors file"),
    ],
)
def test_another_file_is_refused_by_what_it_is(
    tmp_path: Path, write: Callable[[Path], None], problem: str
) -> None:
    write(tmp_path / "masks")
    with pytest.raises(ValueError, match=problem):
        load_masks(tmp_path / "masks", TWO_OF_FOUR)


@every_reader
def test_another_pattern_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    READERS[kind][0](path)
    read: dict[str, Callable[[], Any]] = {
        "masks": lambda: load_masks(path, "1:4"),
        "compressed": lambda: load_compressed(path, "1:4"),
        "maskllm": lambda: load_maskllm(path, {"w": (3, 4)}, "1:4"),
    }
    problem = r"holds 2:4 masks, but the pattern is 1:4: choose|is no 1:4 mask"
    with pytest.raises(ValueError, match=problem):
        read[kind]()


HEADERS = {
    "long": b"\xff" * 7 + b"\x7f",
    "huge shape": b'{"w":{"dtype":"U8","shape":[1000000000000000],"data_offsets":[0,2]}}',
    "huge offsets": b'{"w":{"dtype":"U8","shape":[2],"data_offsets":[0,1000000000000000]}}',
    "deep": b'{"w":' + b"[" * 10_000_000,
    "strange dtype": b'{"w":{"dtype":"F8_E8M0","shape":[2],"data_offsets":[0,2]}}',
    "half bytes": b'{"w":{"dtype":"F4","shape":[4],"data_offsets":[0,2]}}',
}
WITHIN_A_LIMIT = """
import resource, sys
from pathlib import Path
from maskpro_lightning import load_compressed, load_masks
from maskpro_lightning.files.maskfiles import load_maskllm
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 2**28
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        if path.suffix == ".npz":
            load_maskllm(path, {"w": (3, 4)})
        elif "compressed" in path.name:
            load_compressed(path)
        else:
            load_masks(path, "2:4")
    except ValueError:
        continue
    sys.exit(f"{path} was not refused")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS and /proc")
def test_no_file_takes_more_memory_than_it_is_long(tmp_path: Path) -> None:
    for number, (lie, (kind, *_)) in enumerate(LIES.items()):
        write_lie(tmp_path / f"{number} {kind}", lie)
    for number, content in enumerate(HOSTILE_NPZ.values()):
        (tmp_path / f"{number}.npz").write_bytes(content)
    for name, header in HEADERS.items():
        size = b"" if name == "long" else struct.pack("<Q", len(header))
        for kind in ("masks", "compressed"):
            (tmp_path / f"{name} {kind}").write_bytes(size + header + b"\0\0")
    command = [sys.executable, "-c", WITHIN_A_LIMIT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
