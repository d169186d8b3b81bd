"""Converts between Hugging Face's ``config.json`` and our ModelConfig; hf_families.py has what each family means."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from llm_parallel.config.tree import ModelConfig
from llm_parallel.errors import UserError
from llm_parallel.model.hf_families import (
    EVERYWHERE,
    FAMILIES,
    HARMLESS,
    NEEDED_EVERYWHERE,
    READ,
    Family,
    known_families,
    switches_of,
)
from llm_parallel.model.hf_rope import hf_to_rope, rope_to_hf


def hf_config_to_model(values: dict[str, Any]) -> ModelConfig:
    """Our configuration of a Hugging Face model. Raises UserError that names what we cannot represent, and what is
    missing or no value of its field."""
    try:
        return _to_model(values)
    except UserError:
        raise  # it is a ValueError, and says already what is wrong
    except KeyError as error:
        raise UserError(f"config.json has no {error.args[0]}; give a complete Hugging Face folder") from error
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise UserError(f"config.json gives model.{name} = {first['input']!r}: {first['msg'].lower()}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"config.json holds a value of the wrong kind ({error})") from error


VALUED = "ForSequenceClassification"
"""Ending of the class of transformers that has ``score.weight`` in place of an output projection."""


def family_in(values: dict[str, Any]) -> Family:
    """The family that a config.json names. Raises UserError if it is none that we know, or not a language model."""
    name = values.get("model_type")
    if name not in FAMILIES:
        raise UserError(f"model_type is {name!r} in config.json; only {known_families()} can be converted")
    classes = values.get("architectures")
    if classes and not is_value_model(values) and not all(str(one).endswith("ForCausalLM") for one in classes):
        raise UserError(
            f"architectures is {classes} in config.json; only language models (…ForCausalLM), and models of one value "
            "(…ForSequenceClassification with one label), can be converted"
        )
    return FAMILIES[name]


def is_value_model(values: dict[str, Any]) -> bool:
    """Whether a config.json is that of a model that says one number of a text."""
    classes = values.get("architectures") or []
    labels = len(values["id2label"]) if values.get("id2label") else values.get("num_labels", 2)
    return bool(classes) and all(str(one).endswith(VALUED) for one in classes) and labels == 1


def _refuse_what_differs(values: dict[str, Any], family: Family) -> None:
    """Raises UserError that names a field which makes the model another one than its family's."""
    for key, needed in {**NEEDED_EVERYWHERE, **family.needed}.items():
        if values.get(key, needed) not in (needed, None):
            right = "models without it" if needed is None else repr(needed)
            raise UserError(f"{key} is {values[key]!r} in config.json; only {right} can be converted")
    if values.get("quantization_config") is not None:
        raise UserError("quantization_config is given in config.json; only weights that are not quantized can be read")
    kinds = set(values.get("layer_types") or ())
    allowed = {"full_attention", "sliding_attention"} if family.window else {"full_attention"}
    if not kinds <= allowed or len(kinds) > 1:
        raise UserError(
            f"layer_types is {values['layer_types']} in config.json; only one kind of layers, with full attention or "
            "Mistral's window, can be converted"
        )
    if values["vocab_size"] is None:
        raise UserError("vocab_size is null in config.json; give the number of the embedding's rows")


def unused_fields(values: dict[str, Any]) -> list[str]:
    """Fields of a config.json that this program does not read and that are not known to be harmless, or that its family
    does not have: what they say has no effect."""
    family = family_in(values)
    known = {*READ, *HARMLESS, *EVERYWHERE, *NEEDED_EVERYWHERE, *family.needed, *family.by_field, *family.defaults}
    known -= {"attention_bias", "mlp_bias"} - set(family.by_field)
    known -= set() if family.window or "use_sliding_window" in family.needed else {"sliding_window"}
    known -= set() if family.skips_rope else {"no_rope_layers", "no_rope_layer_interval"}
    return sorted(name for name, value in values.items() if name not in known and value not in (None, False))


def _layers_without_rope(given: dict[str, Any], num_layers: int) -> tuple[int, ...]:
    """Numbers of the layers that SmolLM3's two fields mean."""
    listed = given.get("no_rope_layers")
    if listed is None:
        interval = given["no_rope_layer_interval"]
        return tuple(range(interval - 1, num_layers, interval))
    if len(listed) < num_layers:
        raise UserError(
            f"no_rope_layers in config.json has {len(listed)} entries for {num_layers} layers; give one each"
        )
    return tuple(number for number in range(num_layers) if not listed[number])


def _to_model(values: dict[str, Any]) -> ModelConfig:
    family = family_in(values)
    _refuse_what_differs(values, family)
    given = {**EVERYWHERE, **family.defaults, **values}
    heads, layers = values["num_attention_heads"], values["num_hidden_layers"]
    base, scaling, longest = hf_to_rope(given, given["max_position_embeddings"])
    if scaling is not None and family.scalings is not None and scaling.kind not in family.scalings:
        kinds = ", ".join(family.scalings)
        raise UserError(f"rope_type is '{scaling.kind}' in config.json; a {values['model_type']} can only have {kinds}")
    by_field = [name for key, names in family.by_field.items() if given.get(key) for name in names]
    options: dict[str, Any] = dict.fromkeys([*family.always, *by_field], True)
    if family.window:
        options["window_tokens"] = given["sliding_window"]
    if family.skips_rope:
        options["layers_without_rope"] = _layers_without_rope(given, layers)
    return ModelConfig(
        value_head=is_value_model(values),
        num_layers=layers,
        hidden_size=values["hidden_size"],
        ffn_hidden_size=values["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=given["num_key_value_heads"] or heads,
        head_dim=given["head_dim"] or family.default("head_dim"),
        vocab_size=values["vocab_size"],
        max_seq_length_tokens=longest,
        norm_epsilon=given["rms_norm_eps"],
        rope_base=base,
        rope_scaling=scaling,
        tie_embeddings=given["tie_word_embeddings"],
        init_std=given["initializer_range"],
        **options,
    )


def family_of(model: ModelConfig, wanted: str | None = None) -> str:
    """The ``model_type`` under which a model is written: the first family that has all of its options, or ``wanted``,
    from which it came, if that has. Raises UserError if none has."""
    if wanted in FAMILIES and FAMILIES[wanted].fits(model):
        return wanted
    found = next((name for name, family in FAMILIES.items() if family.fits(model)), None)
    if found is None:
        named = ", ".join(f"model.{name}" for name in sorted(switches_of(model)))
        raise UserError(f"no known Hugging Face family has {named} together; this model cannot be exported")
    return found


def model_to_hf_config(
    model: ModelConfig, dtype: str, special: dict[str, Any], wanted: str | None = None
) -> dict[str, Any]:
    """``config.json`` that transformers before and after version 5 read alike. ``special``: ids of begin, end and
    padding; ``wanted``: as in ``family_of``.

    Raises UserError if no family has the model's options."""
    name = family_of(model, wanted)
    family = FAMILIES[name]
    scaling, longest = rope_to_hf(model)
    older: dict[str, Any] = {"rope_scaling": scaling if model.rope_scaling is not None else None}
    if "original_max_position_embeddings" in family.defaults and model.rope_scaling is not None:
        # transformers before 5 takes these three fields of a Phi-3's scaling and no other.
        kept = ("short_factor", "long_factor", *(["attention_factor"] if "attention_factor" in scaling else []))
        older["rope_scaling"] = {"type": scaling["rope_type"], **{key: scaling[key] for key in kept}}
        older["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
    return {
        "architectures": [f"{family.class_name}{VALUED if model.value_head else 'ForCausalLM'}"],
        **({"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}} if model.value_head else {}),
        "model_type": name,
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": longest,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_base,
        **older,
        "rope_parameters": {**scaling, "rope_theta": model.rope_base},
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        **family.settings(model),
        "torch_dtype": dtype,
        "dtype": dtype,
        "use_cache": True,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        **special,
    }
