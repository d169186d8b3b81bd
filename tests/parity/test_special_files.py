"""Tokenizer, generation settings and unknown fields survive Hugging Face → ours → Hugging Face, and what we train has
what AutoTokenizer looks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from llm_parallel.checkpoint.run_file import TOKENIZER_NAME, write_config
from llm_parallel.config.tree import DataConfig, ModelConfig
from llm_parallel.convert.export import export_to_hf
from llm_parallel.convert.importing import import_from_hf
from llm_parallel.convert.settings import write_settings
from llm_parallel.data.tokenizer import load_tokenizer, train_sentencepiece
from llm_parallel.generate.load import describe_folder
from tests.parity.test_text import with_tokenizer
from tests.support.parity_models import our_config, random_folder

TEMPLATE = "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"
TEXTS = ["def main(x):\n    return x + 12345\n", "two  spaces, ünïcode 漢字 🙂", "tabs\tand\n\nlines", "a"]


def changed(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_files_and_special_tokens_come_back(tmp_path: Path) -> None:
    folder = with_tokenizer(random_folder("mistral", tmp_path / "hf", torch.bfloat16))
    changed(folder / "config.json", eos_token_id=[257, 258], bos_token_id=256, pad_token_id=258, some_note="kept",
            sliding_window=None)  # fmt: skip
    changed(folder / "tokenizer_config.json", pad_token="<|end|>", model_max_length=77)
    changed(folder / "generation_config.json", temperature=0.6, do_sample=True)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    import_from_hf(folder, tmp_path / "run", describe_folder(folder), lambda _: None)
    back = export_to_hf(tmp_path / "run", tmp_path / "back")
    before, after = (AutoTokenizer.from_pretrained(one) for one in (folder, back))
    for name in ("eos_token_id", "bos_token_id", "pad_token_id", "model_max_length", "chat_template"):
        assert getattr(before, name) == getattr(after, name) is not None, name
    assert [before(text).input_ids for text in TEXTS] == [after(text).input_ids for text in TEXTS]
    old, new = (AutoConfig.from_pretrained(one) for one in (folder, back))
    for name in ("model_type", "eos_token_id", "bos_token_id", "pad_token_id", "sliding_window", "some_note", "dtype"):
        assert getattr(old, name) == getattr(new, name), name
    generations = [GenerationConfig.from_pretrained(one).to_dict() for one in (folder, back)]
    assert generations[0] == generations[1] and generations[0]["temperature"] == 0.6


def exported(tokenizer: Path, folder: Path) -> Path:
    """The small files of an export of a run that was trained with a tokenizer."""
    checkpoint, target = folder / "iter_0000005", folder / "hf"
    checkpoint.mkdir()
    target.mkdir()
    size = load_tokenizer(tokenizer).vocab_size
    config = our_config_with(tokenizer, size)
    write_config(checkpoint, config)
    beside = config.model_copy(update={"data": DataConfig(tokenizer=str(checkpoint / TOKENIZER_NAME))})
    write_settings(checkpoint, target, beside, "float32")
    return target


def our_config_with(tokenizer: Path, vocabulary: int) -> Any:
    from llm_parallel.config.tree import RunConfig

    return RunConfig(model=ModelConfig(vocab_size=vocabulary), data=DataConfig(tokenizer=str(tokenizer)))


def test_a_tokenizer_that_prepare_trained_loads_in_transformers(tmp_path: Path) -> None:
    texts = [(text + " and the rest of it\n") * 20 for text in TEXTS]
    model = train_sentencepiece(texts, 390, tmp_path)
    ours, theirs = load_tokenizer(model), AutoTokenizer.from_pretrained(exported(model, tmp_path))
    assert (theirs.eos_token_id, theirs.bos_token_id) == (ours.eod, ours.bos) == (2, 1)
    for text in TEXTS:  # where a text begins with a space, transformers 5 leaves out SentencePiece's own one
        assert theirs(text).input_ids == ours.encode(text), text
        assert theirs.decode(ours.encode(text), skip_special_tokens=True).strip() == text.strip()


@pytest.mark.parametrize("name", ["tokenizer.json", ""])
def test_a_tokenizer_json_without_settings_gets_its_end_token(name: str, tmp_path: Path) -> None:
    folder = with_tokenizer(random_folder("llama-2", tmp_path / "theirs"))
    (folder / "tokenizer_config.json").unlink()
    (folder / "config.json").unlink()
    (folder / "generation_config.json").unlink()
    written = exported(folder / name, tmp_path)
    theirs = AutoTokenizer.from_pretrained(written)
    assert theirs.eos_token_id == load_tokenizer(folder).eod == 257
    assert theirs("ab", add_special_tokens=False).input_ids == load_tokenizer(folder).encode("ab")
    assert json.loads((written / "generation_config.json").read_text())["eos_token_id"] == 257


def test_a_tokenizers_folder_of_another_model_names_no_family(tmp_path: Path) -> None:
    """A run may take its tokenizer from another model's folder, whose config.json then says nothing about the run."""
    folder = with_tokenizer(random_folder("qwen3", tmp_path / "theirs"))
    values = json.loads((exported(folder, tmp_path) / "config.json").read_text())
    assert values["model_type"] == "llama" and values["hidden_size"] == 256
    assert our_config(str(folder), 8).model.qk_norm
