"""Which files of a Hugging Face folder hold its model, and what other kinds of folders are, in one sentence each."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from llm_parallel.errors import UserError
from llm_parallel.files import read_json, refuse_outside

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
ADAPTER_NAME, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LFS_POINTER = "Git LFS's pointer to the weights, not the weights; fetch them with git lfs pull"
MOST_HEADER = 100_000_000
"""Bytes of the longest header that safetensors itself reads."""
POINTER = b"version https://git-lfs"
"""First bytes of the small file that stands for a large one until ``git lfs pull`` fetches it."""
FORMATS = (
    ("pytorch_model*.bin", "pytorch_model.bin files, which are pickled and may run code when read"),
    ("consolidated.*.pth", "Meta's consolidated.*.pth files"),
    ("*.gguf", "a GGUF file, which llama.cpp reads"),
    ("tf_model*.h5", "TensorFlow's tf_model.h5"),
    ("flax_model*.msgpack", "Flax's flax_model.msgpack"),
    ("*.onnx", "an ONNX file"),
    ("*.pt", "*.pt files, which are pickled and may run code when read"),
    ("*.pth", "*.pth files, which are pickled and may run code when read"),
)
"""Files of weights that are not read, and what they are."""
REWRITE = (
    "only safetensors files are read; open the model in transformers and write it with save_pretrained, or fetch its "
    "safetensors version"
)


def is_hf_folder(path: str | Path) -> bool:
    """Whether ``path`` is a folder with a Hugging Face model in safetensors files."""
    folder = Path(path)
    if not (folder / CONFIG_NAME).is_file():
        return False
    return (folder / INDEX_NAME).is_file() or any(file.name != ADAPTER_WEIGHTS for file in folder.glob("*.safetensors"))


def is_peft_folder(path: str | Path) -> bool:
    """Whether a folder holds an adapter in PEFT's files."""
    return (Path(path) / ADAPTER_NAME).is_file()


def read_hf_config(folder: str | Path) -> dict[str, Any]:
    """The parsed ``config.json``. Raises UserError if it is missing or is no JSON object."""
    path = Path(folder) / CONFIG_NAME
    return json_object(path, "give a Hugging Face model folder")


def json_object(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a file of JSON. Raises UserError, with what to do instead, if there is none."""
    refuse_outside(path, path.parent)
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); {remedy}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no JSON object; {remedy}")
    return values


def weight_files(folder: Path) -> dict[str, Path] | list[Path]:
    """The file of every tensor by the folder's index, or, without one, the files that hold the model's tensors.

    Raises UserError that names files which the index lists and the folder lacks."""
    index = folder / INDEX_NAME
    if not index.is_file():
        single = folder / SINGLE_NAME
        found = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
        for path in found:
            refuse_outside(path, folder)
        return found
    places = json_object(index, "fetch the Hugging Face folder again").get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{index} has no weight_map with a file for every tensor; fetch the Hugging Face folder again")
    names = sorted(set(places.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise UserError(f"{index} names {outside[0]}, which is not a file of the folder; fetch the folder again")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"{len(missing)} of the {len(names)} files that {index} lists are missing: {', '.join(missing[:3])}{more}; "
            "fetch the Hugging Face folder again"
        )
    for name in names:
        refuse_outside(folder / name, folder)
    return {name: folder / file for name, file in places.items()}


def check_weight_files(folder: str | Path) -> None:
    """Raises UserError for a file of weights that is not whole, as a download that broke off leaves it: empty, cut, a
    pointer of Git LFS. Only the beginning of each file is read."""
    files = weight_files(Path(folder))
    for path in sorted(set(files.values() if isinstance(files, dict) else files)):
        if is_pointer(path):
            raise UserError(f"{path} is {LFS_POINTER}")
        size, whole = path.stat().st_size, _whole_size(path)
        if whole is None:
            raise UserError(f"{path} ({size:,} bytes) is no safetensors file; fetch the Hugging Face folder again")
        if size != whole:
            raise UserError(
                f"{path} has {size:,} bytes, and {whole:,} by its own header; fetch the Hugging Face folder again"
            )


def _whole_size(path: Path) -> int | None:
    """Bytes that a safetensors file has by its header; None if it has no such header."""
    try:
        with path.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if not 2 <= length <= MOST_HEADER:
                return None
            header = json.loads(handle.read(length))
        ends = [one["data_offsets"][1] for name, one in header.items() if name != "__metadata__"]
        return 8 + length + max(map(int, ends), default=0)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return None


def is_pointer(path: Path) -> bool:
    """Whether a file is Git LFS's pointer to the real one."""
    with suppress(OSError), path.open("rb") as handle:
        return handle.read(len(POINTER)) == POINTER
    return False


def _model_of(path: Path) -> str:
    """Which model a run file names, ours or one of another system, as the end of a sentence."""
    with suppress(OSError, ValueError, yaml.YAMLError):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        for name in ("run_dir", "output_dir", "export_dir", "model_name_or_path") if isinstance(values, dict) else ():
            if isinstance(values.get(name), str):
                return f", such as {values[name]}, its {name}"
    return ""


def what_it_is(path: str | Path) -> str | None:
    """One sentence about a file or folder that holds a model in a form which is not read, and what to do; None if it is
    nothing that is known."""
    path = Path(path)
    if path.is_file():
        if path.suffix == ".gguf":
            return f"{path} is a GGUF file, which llama.cpp reads; {REWRITE}"
        if path.suffix in (".yaml", ".yml"):
            return f"{path} is a run file; give the folder of a model{_model_of(path)}"
        return f"{path} is a file; give the folder that holds it"
    if not path.is_dir():
        return None
    weights = [file for file in path.glob("*.safetensors") if file.name != ADAPTER_WEIGHTS]
    if (path / ADAPTER_NAME).is_file() and not weights:
        base = ""
        with suppress(UserError):
            named = json_object(path / ADAPTER_NAME, "").get("base_model_name_or_path")
            base = f" {named}" if isinstance(named, str) else ""
        return (
            f"{path} is a PEFT folder: it holds adapters (adapter_config.json), not the model{base} that they change; "
            "merge them into it with convert --merge, or begin a run from them with adapter.load"
        )
    if weights and not (path / CONFIG_NAME).is_file():
        what = "Mistral's own format" if (path / "params.json").is_file() else "a part of a Hugging Face folder"
        return f"{path} has safetensors files and no config.json ({what}); give a complete Hugging Face folder"
    for pattern, named in FORMATS if not weights else ():
        if any(path.glob(pattern)):
            return f"{path} holds its weights as {named}; {REWRITE}"
    if (path / CONFIG_NAME).is_file() and not weights:
        return f"{path} has a config.json and no weights (*.safetensors); fetch the Hugging Face folder again"
    if (path / "snapshots").is_dir():
        inside = next((str(one) for one in sorted((path / "snapshots").iterdir()) if one.is_dir()), "a folder in it")
        return f"{path} is an entry of Hugging Face's cache; give the folder of one revision, such as {inside}"
    return None
