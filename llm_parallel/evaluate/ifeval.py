"""What lm-eval's IFEval needs that it would otherwise download: NLTK's rules for the ends of sentences.

NLTK's ``punkt_tab`` is a folder of tables that a model of abbreviations was trained to. We write such a folder with
common English abbreviations of our own choice, so that sentences are divided by NLTK's code without a download. Of
IFEval's 541 prompts 64 count sentences or words by it.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from functools import cache
from pathlib import Path

from llm_parallel.errors import UserError

NEEDED = ("nltk", "langdetect", "immutabledict")
ABBREVIATIONS = """dr mr mrs ms prof st jr sr vs etc e.g i.e inc ltd co corp dept est fig no vol pp ca cf al approx gen
col capt lt sgt rev hon gov sen rep u.s u.k u.n a.m p.m jan feb mar apr jun jul aug sep sept oct nov dec"""


def write_punkt(folder: Path) -> None:
    """Writes the tables of ``tokenizers/punkt_tab/english`` into a folder of NLTK's data."""
    english = folder / "tokenizers" / "punkt_tab" / "english"
    english.mkdir(parents=True, exist_ok=True)
    (english / "abbrev_types.txt").write_text("\n".join(ABBREVIATIONS.split()))
    for name in ("collocations.tab", "sent_starters.txt", "ortho_context.tab"):
        (english / name).write_text("")


def prepare() -> None:
    """Makes lm-eval's IFEval usable in this process. Raises UserError if a package is missing."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"ifeval needs {', '.join(missing)}, not installed here; pip install 'lm-eval[ifeval]'")
    import langdetect
    import nltk

    langdetect.DetectorFactory.seed = 0  # its answers are random otherwise
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        folder = _kept(os.getpid())
        write_punkt(Path(folder.name))
        nltk.data.path.append(folder.name)


@cache
def _kept(process: int) -> tempfile.TemporaryDirectory[str]:
    """A folder that is removed when this process ends."""
    return tempfile.TemporaryDirectory(prefix="llm-parallel-nltk-")
