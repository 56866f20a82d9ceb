"""Whether a store is the one that a config asks for, of the language model and the text that are there now."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from clt.config import Config
from clt.data.index import StoreIndex
from clt.errors import UserError, mismatches, tell
from clt.lm.fingerprint import fingerprints
from clt.ranges import NORM_OUTPUT, OUTPUT

if TYPE_CHECKING:
    from clt.lm.load import LanguageModel


def check_store(index: StoreIndex, config: Config) -> None:
    """Raise UserError, naming every field that differs, unless a store is the one that the config asks for."""
    if odd := differences(index, config):
        raise UserError(
            f"the {index.text['part']} store in {config.data.store} is not the one that the config asks for: {odd}; "
            "set data.store to another directory, or delete this store to extract it again, or change the config"
        )


def differences(index: StoreIndex, config: Config) -> str:
    """The fields in which a store differs from the config: what was found and what was wanted; empty if none."""
    lm = config.lm
    found = {
        "lm.model": index.model,
        "lm.revision": index.revision if lm.revision == index.revision else index.lm_revision,
        "lm.dtype": index.lm_dtype,
        "lm.layers": index.layers,
        "lm.context": index.context,
        "lm.input_site": index.input_sites,
        "lm.output_site": index.output_sites,
        "data.dtype": index.dtype,
        f"data.{index.text['part']}_tokens": index.rows,
        "data.seed": index.seed,
        **{f"text.{key}": index.text.get(key) for key in vars(config.text)},
    }
    if (index.fingerprints or {}).get(f"{index.text['part']} text") == f"text.revision={config.text.revision}":
        found["text.revision"] = config.text.revision
    wanted = {key: attrgetter(key)(config) for key in found}
    if lm.layers is None:
        wanted["lm.layers"] = list(range(index.lm_layers or index.n_layers))
    for key in ("lm.input_site", "lm.output_site"):
        template = wanted[key]
        if template in (None, NORM_OUTPUT):  # by the model's own names, which only the model knows
            wanted[key] = found[key]
            if any(site.endswith(OUTPUT) != (template is not None) for site in found[key]):
                wanted[key] = template
        else:
            paths = [template.replace("{layer}", str(layer)) for layer in index.layers]  # or their ends
            wanted[key] = [s if f".{s}".endswith(f".{path}") else path for s, path in zip(found[key], paths)]
    return mismatches(found, wanted)


def check_files(index: StoreIndex, config: Config) -> None:
    """Raise UserError, naming what differs, when files of model or text are no longer those that a store was made from.

    Only files that are on this machine can be compared.
    """
    if index.fingerprints is None:
        _warn_without_fingerprints(config.data.store)
    elif odd := changes(index.fingerprints, fingerprints(config, index.text["part"])):
        raise UserError(
            f"files have changed since the {index.text['part']} store in {config.data.store} was extracted: {odd}; put "
            "them back as they were, or delete this store to extract it again, or set data.store to another directory"
        )


def changes(found: Mapping[str, str] | None, wanted: Mapping[str, str] | None) -> str:
    """The fingerprints that are in both and differ; empty if there are none."""
    found = found or {}
    return mismatches(found, {kind: text for kind, text in (wanted or {}).items() if kind in found})


@functools.cache
def _warn_without_fingerprints(store: str) -> None:
    tell(
        f"warning: a store in {store} has no fingerprints of model and text, as older releases wrote it: whether these "
        "are still what it was extracted from is not checked"
    )


def check_model(index: StoreIndex, lm: LanguageModel) -> None:
    """Raise UserError, naming what differs, unless a store holds activations of this language model."""
    if odd := mismatches(dataclasses.asdict(index), read_from(lm)):
        raise UserError(
            f"the store was extracted from another version of the model {lm.name!r}: {odd}; "
            "set lm.model or lm.revision to the one it was, or set data.store to another directory and extract again"
        )


def read_from(lm: LanguageModel) -> dict[str, Any]:
    """The fields of an index that say which activations of which language model were read."""
    return {
        "d_acts": lm.d_model,
        "layers": list(lm.layers),
        "input_sites": [site.input_path for site in lm.sites],
        "output_sites": [site.output_path for site in lm.sites],
        "revision": lm.revision,
        "tokenizer_hash": lm.tokenizer_hash,
    }
