"""How run files are read as YAML, and written."""

from __future__ import annotations

import re

import yaml

TEXT_TAG = "tag:yaml.org,2002:str"


class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads YAML, by libyaml where PyYAML has it. Numbers are those of YAML 1.2: ``3e-4`` is a number, not text as in
    1.1."""


class Dumper(yaml.SafeDumper):
    """Quotes text that ``Loader`` would take for a number, or whose characters a reader would take for line ends
    (U+0085, U+2028) or refuse."""


for _kind in (Loader, Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )

Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(TEXT_TAG, text, style=None if text.isprintable() else '"'),
)
