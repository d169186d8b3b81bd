"""Adapters in the files of Hugging Face's PEFT: ``adapter_model.safetensors`` and ``adapter_config.json``.

PEFT has two factors for each projection, A [rank, in] and B [out, rank]. Ours stand together in one adapter for each
linear (``model/adapters.py``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llm_parallel.config.tree import ModelConfig
from llm_parallel.config.tree_tune import AdapterConfig
from llm_parallel.errors import UserError
from llm_parallel.files import atomic_write
from llm_parallel.model.adapters import PROJECTIONS, adapters_of, linears_of, rows_by_projection, targets_of
from llm_parallel.model.tensors import ADAPTER_MARK, LAYERS, VALUE, canonical_parameters, kind_of
from llm_parallel.model.vocabulary_adapters import (
    EMBED_TOKENS,
    LM_HEAD,
    PREFIXES,
    WEIGHTS,
    own_rows,
    vocabulary_adapters,
)
from llm_parallel.parallel.engine import Network

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # others change the base's weights
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "loftq_config": ({},),
}
"""Options of PEFT that change what an adapted model computes, and the values with which they do not; for all others in
``CHANGING`` that is ``null`` or ``false``."""
CHANGING = (
    *PLAIN,
    *("fan_in_fan_out", "lora_bias", "use_qalora", "use_bdlora", "layers_to_transform"),
    *("layer_replication", "trainable_token_indices", "target_parameters", "alora_invocation_tokens"),
    *("arrow_config", "kasa_config", "velora_config", "monteclora_config"),
)
_PLACES = {
    kind_of(f"{LAYERS}{linear}.weight").hf_names[number].removesuffix(".weight"): (linear, projection)
    for linear, projections in PROJECTIONS.items()
    for number, projection in enumerate(projections)
}
"""Where a module of Hugging Face's layer is in ours: linear and projection."""
_MODULES = {projection: module for module, (_, projection) in _PLACES.items()}
_TENSOR = re.compile(
    r"base_model\.model\.model\.layers\.(\d+)\.([a-z_.]+)\.lora_(A\.weight|B\.weight|magnitude_vector)"
)
_OUTER = "base_model.model."
_PATHS = {EMBED_TOKENS: f"{_OUTER}model.{EMBED_TOKENS}", LM_HEAD: f"{_OUTER}{LM_HEAD}"}
_FACTORS = {
    EMBED_TOKENS: (f"{_PATHS[EMBED_TOKENS]}.lora_embedding_A", f"{_PATHS[EMBED_TOKENS]}.lora_embedding_B"),
    LM_HEAD: (f"{_PATHS[LM_HEAD]}.lora_A.weight", f"{_PATHS[LM_HEAD]}.lora_B.weight"),
}
"""Names of the adapters on the embedding, whose A is [rank, tokens] and B [hidden, rank], and on the output."""
_WHOLE = {name: f"{path}.weight" for name, path in _PATHS.items()}
"""Names of weights that were trained whole. Beside an adapter PEFT also writes the weight under it, which is frozen."""
SCORE = f"{_OUTER}score.weight"
"""The value head of a model for sequence classification with one label, which PEFT trains whole too."""
_FROZEN = tuple(f"{path}.base_layer.weight" for path in _PATHS.values())


class PeftFolder:
    """An adapter of PEFT for a model of ours. ``settings``: what it is as an adapter of ours; ``base``: the name or
    path of its model, as it is written there.

    Raises UserError for an adapter that computes something else than ours, or does not fit the model."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            values = json.loads((self.folder / CONFIG_NAME).read_text(encoding="utf-8"))
            self._tensors = _read_tensors(self.folder / WEIGHTS_NAME)
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{self.folder} is not a complete PEFT adapter ({error}); save it again") from error
        self._refuse_other_functions(values)
        self.base: str | None = values.get("base_model_name_or_path")
        self.settings = AdapterConfig(
            rank=values["r"],
            alpha=values["lora_alpha"],
            rank_stabilized=bool(values.get("use_rslora")),
            dora=bool(values.get("use_dora")),
            dropout=values.get("lora_dropout", 0.0),
            targets=self._targets(),
            modules_to_save=self._whole(values),
        )
        self._shares = bool(values.get("ensure_weight_tying"))

    def _refuse_other_functions(self, values: Mapping[str, Any]) -> None:
        for name in CHANGING:
            value = values.get(name)
            if (value and value not in PLAIN.get(name, ())) or (name == "peft_type" and not value):
                raise UserError(
                    f"{self.folder / CONFIG_NAME} has {name} = {json.dumps(value)}, which adapters here do not have; "
                    "give a LoRA without it, or merge it into its model with PEFT"
                )
        for name in ("r", "lora_alpha"):
            if not isinstance(values.get(name), int | float) or values[name] <= 0:
                raise UserError(f"{self.folder / CONFIG_NAME} has {name} = {values.get(name)}; it must be over 0")

    def _targets(self) -> tuple[Any, ...]:
        """The projections that have factors, which says more than ``target_modules``: a list, a pattern, or
        "all-linear"."""
        found: dict[str, set[int]] = {}
        on_vocabulary = [name for name, factors in _FACTORS.items() if factors[0] in self._tensors]
        known = {SCORE, *_FROZEN, *_WHOLE.values(), *(factor for name in on_vocabulary for factor in _FACTORS[name])}
        for name in (name for name in self._tensors if name not in known):
            if "magnitude" in name and (odd := [x for x, path in _PATHS.items() if name.startswith(f"{path}.")]):
                raise UserError(
                    f"{self.folder / WEIGHTS_NAME} has {name}, a magnitude of {odd[0]} (use_dora), which adapters "
                    "on it do not have here; train it without, or merge it into its model with PEFT"
                )
            parts = _TENSOR.fullmatch(name)
            if parts is None or parts[2] not in _PLACES:
                raise UserError(
                    f"{self.folder / WEIGHTS_NAME} has {name}; adapters here are on {', '.join(_MODULES.values())} of "
                    f"the layers, on {EMBED_TOKENS} and on {LM_HEAD} only"
                )
            found.setdefault(_PLACES[parts[2]][1], set()).add(int(parts[1]))
        layers = max(found.values(), key=len, default=set())
        for projection, those in found.items():
            if those != layers or those != set(range(len(those))):
                raise UserError(
                    f"{self.folder / WEIGHTS_NAME} has {_MODULES[projection]} of some layers only; adapters here are "
                    "on the same projections of all layers"
                )
        if not found and not on_vocabulary:
            raise UserError(f"{self.folder / WEIGHTS_NAME} holds no adapters; give another folder")
        self.num_layers = len(layers) if found else None
        of_layers = [name for projections in PROJECTIONS.values() for name in projections if name in found]
        return (*of_layers, *on_vocabulary)

    def _whole(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """The weights that were trained whole; PEFT names some of them more than once."""
        given = {str(name).rpartition(".")[2] for name in values.get("modules_to_save") or ()}
        given -= {"score", "classifier"} if SCORE in self._tensors else set()
        if others := sorted(given - set(_WHOLE)):
            raise UserError(
                f"{self.folder / CONFIG_NAME} has modules_to_save = {json.dumps(others)}; trained whole beside "
                f"adapters are {' and '.join(_WHOLE)} only"
            )
        held = {name for name, tensor in _WHOLE.items() if tensor in self._tensors}
        if given and values.get("ensure_weight_tying"):  # then the one that is named stands for both
            given |= held
        if odd := sorted(held ^ given):
            raise UserError(
                f"{self.folder / WEIGHTS_NAME} {'has' if odd[0] in held else 'lacks'} {_WHOLE[odd[0]]}, and "
                f"modules_to_save in {CONFIG_NAME} is {json.dumps(sorted(given))}; load it into its model with PEFT, "
                "and save both anew"
            )
        return tuple(name for name in _WHOLE if name in given)

    def base_path(self) -> str:
        """Where the model under the adapter is. Raises UserError if it is not a folder here."""
        if self.base is None or not Path(self.base).is_dir():
            raise UserError(
                f"{self.folder} adapts {self.base}, which is not a folder here; put it there, or its path as "
                f"base_model_name_or_path into {self.folder / CONFIG_NAME}"
            )
        return self.base

    def check(self, model: ModelConfig) -> None:
        """Raises UserError if the adapter is for a model of other sizes."""
        self._check_vocabulary(model)
        self._check_head(model)
        if self.num_layers not in (None, model.num_layers):
            raise UserError(
                f"{self.folder} has adapters for {self.num_layers} layers, and the model has {model.num_layers}; give "
                "the model that they were trained on"
            )
        for projection in (name for name in self.settings.targets if name in _MODULES):
            linear = next(linear for linear, those in PROJECTIONS.items() if projection in those)
            rows, columns = _size(model, linear, projection)
            sizes: dict[str, tuple[int, ...]] = {"A": (self.settings.rank, columns), "B": (rows, self.settings.rank)}
            if self.settings.dora:
                sizes[MAGNITUDE] = (rows,)
            for factor, wanted in sizes.items():
                self._check_shape(_tensor_name(0, projection, factor), wanted)

    def _check_vocabulary(self, model: ModelConfig) -> None:
        assert model.vocab_size is not None
        table, rank = (model.vocab_size, model.hidden_size), self.settings.rank
        for name in set(self.settings.targets) & set(_FACTORS):
            of_embedding = name == EMBED_TOKENS
            self._check_shape(_FACTORS[name][0], (rank, table[0] if of_embedding else table[1]))
            self._check_shape(_FACTORS[name][1], (table[1] if of_embedding else table[0], rank))
            if model.tie_embeddings and self._shares:
                raise UserError(
                    f"{self.folder / CONFIG_NAME} has ensure_weight_tying = true and adapts {name} of a model with "
                    "tied embeddings, so that both have the same factors; adapters here have their own: merge it with "
                    "PEFT"
                )
        for name in self.settings.modules_to_save:
            self._check_shape(_WHOLE[name], table)
        if model.tie_embeddings and self.settings.modules_to_save:
            parts = [self._tensors[_WHOLE[name]] for name in self.settings.modules_to_save]
            if len(parts) < len(_WHOLE) or not torch.equal(*parts):
                raise UserError(
                    f"{self.folder} trained {' and '.join(self.settings.modules_to_save)} of a model with tied "
                    "embeddings apart; here they stay one matrix: merge it with PEFT, or train it with "
                    "ensure_weight_tying"
                )

    def _check_shape(self, name: str, wanted: tuple[int, ...]) -> None:
        shape = tuple(self._tensors[name].shape) if name in self._tensors else None
        if shape != wanted:
            raise UserError(
                f"{name} in {self.folder} has shape {shape and list(shape)}, and the model needs {list(wanted)}; give "
                "the model that the adapters were trained on"
            )

    @property
    def has_head(self) -> bool:
        """Whether the model has a value head."""
        return SCORE in self._tensors

    def _check_head(self, model: ModelConfig) -> None:
        if self.has_head != model.value_head:
            raise UserError(
                f"{self.folder / WEIGHTS_NAME} {'has' if self.has_head else 'lacks'} {SCORE}, the head of a reward "
                f"model, and the model {'gives texts no value' if self.has_head else 'is one'}; give the adapters of a "
                "model of the same kind"
            )
        if self.has_head:
            self._check_shape(SCORE, (1, model.hidden_size))

    def head(self) -> Tensor:
        """The value head, [1, hidden]."""
        return self._tensors[SCORE]

    def vocabulary_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A and B of the adapter on the embedding or the output projection, whole, as ours are."""
        a, b = (self._tensors[factor] for factor in _FACTORS[name])
        return (a.t() if name == EMBED_TOKENS else a), b

    def whole(self, name: str) -> Tensor:
        """The weight of the embedding or the output projection, if it was trained whole."""
        return self._tensors[_WHOLE[name]]

    def factors(self, model: ModelConfig, layer: int, linear: str) -> tuple[Tensor, Tensor]:
        """A and B of the adapter of one linear, whole, as ours are."""
        targets = targets_of(linear, self.settings)
        found = {
            target: tuple(self._tensors[_tensor_name(layer, target, factor)] for factor in "AB") for target in targets
        }
        a = torch.cat([found[target][0] for target in targets])
        return a, _in_order(model, linear, {target: b for target, (_, b) in found.items()})

    def magnitudes(self, model: ModelConfig, layer: int, linear: str) -> Tensor:
        """Of DoRA: magnitudes of the rows of one linear's whole weight, 0 for those without an adapter."""
        names = {target: _tensor_name(layer, target, MAGNITUDE) for target in targets_of(linear, self.settings)}
        return _in_order(model, linear, {target: self._tensors[name] for target, name in names.items()})


MAGNITUDE = "magnitude_vector"
"""PEFT's name for the magnitudes of DoRA."""
_COLUMN = ("self_attention.linear_qkv", "mlp.linear_fc1")


def _in_order(model: ModelConfig, linear: str, found: Mapping[str, Tensor]) -> Tensor:
    """Rows of projections in the order of a linear's weight; zeros for projections that are not there."""
    some = next(iter(found.values()))
    if linear not in _COLUMN:
        return some
    taken, parts = dict.fromkeys(PROJECTIONS[linear], 0), []
    for projection, rows in rows_by_projection(model, linear):
        start = taken[projection]
        taken[projection] += rows
        of_rows = found[projection][start : start + rows] if projection in found else None
        parts.append(some.new_zeros(rows, *some.shape[1:]) if of_rows is None else of_rows)
    return torch.cat(parts)


def _by_projection(model: ModelConfig, linear: str, targets: Sequence[str], rows_of_all: Tensor) -> dict[str, Tensor]:
    """Inverse of ``_in_order``, for the projections in ``targets``."""
    if linear not in _COLUMN:
        return {targets[0]: rows_of_all.contiguous()}
    parts: dict[str, list[Tensor]] = {target: [] for target in targets}
    offset = 0
    for projection, rows in rows_by_projection(model, linear):
        if projection in parts:
            parts[projection].append(rows_of_all[offset : offset + rows])
        offset += rows
    return {target: torch.cat(rows) for target, rows in parts.items()}


def _read_tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  (not a mapping)


def _size(model: ModelConfig, linear: str, projection: str) -> tuple[int, int]:
    """Rows and columns of a projection's weight."""
    shape = kind_of(f"{LAYERS}{linear}.weight").shape(model)
    if linear not in _COLUMN:
        return shape[0], shape[1]
    return sum(rows for name, rows in rows_by_projection(model, linear) if name == projection), shape[1]


def _tensor_name(layer: int, projection: str, factor: str) -> str:
    return f"base_model.model.model.layers.{layer}.{_MODULES[projection]}.lora_{factor}" + (
        "" if factor == MAGNITUDE else ".weight"
    )


@torch.no_grad()
def load_peft(folder: PeftFolder, network: Network) -> None:
    """Puts PEFT's factors into a network's adapters, each process the parts that it holds. The optimizer's fp32 copies
    are not changed. Raises UserError if the adapters are not of the network's kind."""
    assert network.base is not None
    here, theirs = network.base.adapter, folder.settings
    for name in ("rank", "alpha", "rank_stabilized", "dora", "targets", "modules_to_save"):
        ours, saved = getattr(here, name), getattr(theirs, name)
        if set(ours) != set(saved) if isinstance(ours, tuple) else ours != saved:
            ours, saved = (list(x) if isinstance(x, tuple) else x for x in (ours, saved))
            raise UserError(f"adapter.{name} is {ours}, and {folder.folder} has {saved}; make them the same")
    mesh, at, model = network.groups.mesh, network.groups.at, network.models[0].model_config
    folder.check(model)
    weights = {
        (layer, linear): module.weight for chunk in network.models for layer, linear, module in linears_of(chunk)
    }
    for layer, linear, adapter in adapters_of(network.models):
        tensors = dict(zip("ab", folder.factors(model, layer, linear)))
        if here.dora:
            tensors["m"] = folder.magnitudes(model, layer, linear)
        for name, whole in tensors.items():
            kind, factor = kind_of(f"{LAYERS}{linear}{ADAPTER_MARK}{name}"), getattr(adapter, name)
            parts = [
                whole.narrow(kind.piece_dim, r.start, len(r))
                for r in kind.shard(whole.shape[kind.piece_dim], mesh.tp, at.tp)
            ]
            factor.copy_(torch.cat(parts, dim=kind.piece_dim))
        if here.dora:
            met, norms = adapter.rows_met(), adapter.squares(weights[layer, linear]).sqrt()
            beside = adapter.m.float() - norms
            adapter.m.copy_(beside if met is None else torch.where(met, beside, 0.0))
    _load_vocabulary(folder, network)


def _load_vocabulary(folder: PeftFolder, network: Network) -> None:
    """The same for what is on the vocabulary, and for what was trained whole."""
    groups = network.groups
    for name, adapter in vocabulary_adapters(network.models):
        for factor, whole in zip("ab", folder.vocabulary_factors(name)):
            held = getattr(adapter, factor)
            held.copy_(own_rows(f"{PREFIXES[name]}{factor}", whole, held, groups))
    whole = {WEIGHTS[name]: folder.whole(name) for name in folder.settings.modules_to_save}
    whole |= {VALUE.name: folder.head()} if folder.has_head else {}
    for chunk in network.models:
        for name, parameter in canonical_parameters(chunk):
            if name in whole:
                parameter.copy_(own_rows(name, whole[name], parameter, groups))


def peft_tensors(
    model: ModelConfig,
    adapter: AdapterConfig,
    layer: int,
    linear: str,
    a: Tensor,
    b: Tensor,
    magnitudes: Tensor | None = None,
) -> dict[str, Tensor]:
    """PEFT's tensors of the adapter of one linear, from its whole factors and, of DoRA, the whole magnitudes."""
    targets, found = targets_of(linear, adapter), {}
    for number, target in enumerate(targets):
        part = slice(number * adapter.rank, (number + 1) * adapter.rank)
        found[_tensor_name(layer, target, "A")] = a[part].contiguous()
    for name, rows in (("B", b), (MAGNITUDE, magnitudes)):
        if rows is not None:
            parts = _by_projection(model, linear, targets, rows)
            found |= {_tensor_name(layer, target, name): part for target, part in parts.items()}
    return found


def peft_vocabulary_tensors(model: ModelConfig, name: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """PEFT's tensors of the adapter on the embedding or the output projection, from its whole factors."""
    size = model.vocab_size
    found = (a[:size].t(), b) if name == EMBED_TOKENS else (a, b[:size])
    return {tensor: factor.contiguous() for tensor, factor in zip(_FACTORS[name], found)}


def peft_whole_tensor(model: ModelConfig, name: str, weight: Tensor) -> dict[str, Tensor]:
    """PEFT's tensor of a weight that was trained whole beside adapters."""
    return {_WHOLE[name]: weight[: model.vocab_size].clone()}


def write_peft(folder: Path, tensors: dict[str, Tensor], adapter: AdapterConfig, base: str, model: ModelConfig) -> None:
    """Writes both files of adapters on a model, in the folder ``base``, as PEFT writes them."""
    whole = [*adapter.modules_to_save, *(["score"] if model.value_head else [])]
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    values = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if model.value_head else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rank_stabilized,
        "use_dora": adapter.dora,
        "target_modules": sorted(_MODULES.get(target, target).rpartition(".")[2] for target in adapter.targets),
        "modules_to_save": whole or None,
        "ensure_weight_tying": model.tie_embeddings and bool(adapter.modules_to_save),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with atomic_write(folder / CONFIG_NAME) as handle:
        json.dump(values, handle, indent=1)
