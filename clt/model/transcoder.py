"""The cross-layer transcoder (Anthropic, "Circuit Tracing", 2025)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from clt.errors import mismatches, shown
from clt.files import TensorFiles, read_object, reading
from clt.hub import local_directory
from clt.model.activations import THRESHOLD_FLOOR, fire, theta
from clt.model.normalization import ALL, Normalization
from clt.model.spec import CLTConfig, Sites, check_rule
from clt.model.topk import per_token
from clt.ranges import POSITIVE, fit, hints

FEATURE_DIM = {"W_enc": 2, "b_enc": 1, "threshold": 2, "W_dec": 0}  # every other tensor is whole in each shard


def feature_dim(name: str) -> int | None:
    """The dimension of a parameter (`W_dec.3`) or buffer that counts features; None for one that has none."""
    return FEATURE_DIM.get(name.partition(".")[0])


def unsharded(y: Tensor) -> Tensor:
    """The sum over shards of a transcoder that has one shard."""
    return y


class CrossLayerTranscoder(nn.Module):
    """Reads the residual stream before every MLP, writes the MLP outputs of its own and all later layers.

        pre[b, l] = x~[b, l] @ W_enc[l] + b_enc[l]                  W_enc (L, D, F), b_enc (L, F)
        a = fire(pre, theta)                                        threshold (1, L, F), see CLTConfig.activation
        y~[b, t] = sum_{s <= t} a[b, s] @ W_dec[s -> t] + b_dec[t]  W_dec.{s} (F, L - s, D), b_dec (L, D)
                   + x~[b, t] @ W_skip[t]                           W_skip (L, D, D), or None without `skip`

    of B tokens, L layers, D = d_acts residual width, F = d_features per layer. With a `window` of w, W_dec.{s} is
    (F, min(w, L - s), D): a feature writes to its own and the next w - 1 layers. With `cross_layer=False` it is
    (F, 1, D): one independent transcoder per layer.

    A shard (i, n) holds the i-th of n equal parts of every layer's features, and the whole of b_dec and W_skip: F is
    then its own number of features, and `sum_shards` must add up a partial reconstruction over all shards, in place.
    Its initial weights are that part of the whole transcoder's.

    Raises UserError for a value of `spec` that is out of its range and as `check_rule`, ValueError when n does not
    divide the features.
    """

    def __init__(
        self,
        n_layers: int,
        d_acts: int,
        spec: CLTConfig,
        *,
        sites: Sites = Sites(),  # noqa: B008 - frozen
        shard: tuple[int, int] = (0, 1),
        sum_shards: Callable[[Tensor], Tensor] = unsharded,
    ) -> None:
        super().__init__()
        for name, hint in hints(type(spec)).items():
            fit(name, hint, getattr(spec, name))
        check_rule(spec, n_layers)
        (part, parts), d_features = shard, spec.d_features
        if d_features % parts:
            raise ValueError(f"{d_features} features cannot be split into {parts} equal shards; wanted a divisor")
        self.spec, self.sites = spec, sites
        self.config: dict[str, Any] = {"n_layers": n_layers, "d_acts": d_acts, **asdict(sites), **asdict(spec)}
        L, D, F = n_layers, d_acts, d_features // parts
        self.n_layers, self.d_acts, self.d_features = L, D, F
        self.features = slice(part * F, (part + 1) * F)
        self.shards, self.sum_shards = parts, sum_shards
        # The whole of each tensor is drawn and this shard's part kept: the same weights however they are sharded.
        bound_enc, bound_dec = d_features**-0.5, (L * D) ** -0.5
        self.W_enc: nn.Parameter = nn.Parameter(uniform(bound_enc, L, D, d_features)[:, :, self.features].clone())
        self.b_enc = nn.Parameter(torch.zeros(L, F))
        self.threshold = nn.Parameter(
            torch.full((1, L, F), spec.threshold), requires_grad=spec.activation == "jumprelu"
        )
        self.threshold_floor = min(THRESHOLD_FLOOR, spec.threshold)
        reach = (spec.window or L) if spec.cross_layer else 1
        self.W_dec: nn.ParameterList = nn.ParameterList(
            uniform(bound_dec, d_features, min(reach, L - s), D)[self.features].clone() for s in range(L)
        )
        self.b_dec = nn.Parameter(torch.zeros(L, D))
        self.W_skip = nn.Parameter(torch.zeros(L, D, D)) if spec.skip else None
        self.normalization = Normalization(L, D, spec.normalization)

    def encode_layer(self, x: Tensor, layer: int) -> Tensor:
        """Residual stream x (B, D) of one layer, in model units -> its features (B, F)."""
        pre = self.normalization.input(x, layer) @ self.W_enc[layer] + self.b_enc[layer]
        threshold, norm = self.threshold[0, layer], self.norm(layer) if self.spec.by_norm else None
        match self.spec.activation:
            case "relu":
                threshold = torch.zeros_like(threshold)
            case "topk":
                assert self.spec.k is not None
                scores = pre if norm is None else pre * norm
                threshold = per_token(scores.t(), self.spec.k, self.gather_shards).t()  # (B, 1)
        return fire(pre, theta(self.spec, threshold, norm)).features

    @torch.no_grad()
    def track(self, thresholds: Sequence[Tensor], steps: int) -> None:
        """With `batchtopk`: take the thresholds () of a step's micro-batches into the running mean that `encode` uses.

        steps: with the final k so far, this one included; none of them before k has fallen to it. The mean is over
        these steps, or about the last 100 of them; while k falls, over about the last 10.
        """
        if self.spec.activation == "batchtopk":
            new = torch.stack(tuple(thresholds)).mean()
            self.threshold.lerp_(
                torch.where(new.isfinite(), new, self.threshold), max(1 / steps, 0.01) if steps > 0 else 0.1
            )

    def norm(self, layer: int) -> Tensor:
        """The norm (F,) of what each feature of a layer writes, to all its target layers."""
        return torch.linalg.vector_norm(self.W_dec[layer].flatten(1), dim=1)

    def gather_shards(self, rows: Tensor) -> Tensor:
        """rows (m, B) of this shard -> those of all shards, (shards * m, B)."""
        if self.shards == 1:
            return rows
        of_shards = rows.new_zeros(self.shards, *rows.shape)
        of_shards[self.features.start // self.d_features] = rows
        return self.sum_shards(of_shards).flatten(0, 1)

    def decode_layer(self, features: Sequence[Tensor], x: Tensor, layer: int) -> Tensor:
        """features[s] (B, F) for s = 0 .. layer, and x (B, D) of `layer` -> its MLP output yhat (B, D).

        x and yhat are in model units.
        """
        y = features[layer] @ self.W_dec[layer][:, 0]
        for s in range(layer):
            if layer - s < self.W_dec[s].shape[1]:
                y = y + features[s] @ self.W_dec[s][:, layer - s]
        return self.finish(y, x, layer)

    def write_layer(self, features: Tensor, y: Tensor, layer: int) -> None:
        """Add what this shard's features (B, F) of a layer write to y~ (B, L, D), in place."""
        weight = self.W_dec[layer]  # (F, T, D)
        y[:, layer : layer + weight.shape[1]] += (features @ weight.flatten(1)).unflatten(1, weight.shape[1:])

    def finish(self, y: Tensor, x: Tensor, layer: int | slice = ALL) -> Tensor:
        """What this shard's features write to y~, and x in model units -> yhat in model units.

        All three are (B, L, D), or (B, D) of one layer.
        """
        y = self.sum_shards(y) + self.b_dec[layer]
        if self.W_skip is not None:
            y = y + torch.einsum("...d,...de->...e", self.normalization.input(x, layer), self.W_skip[layer])
        return self.normalization.output(y, layer)

    def encode(self, x: Tensor) -> Tensor:
        """Residual streams x (B, L, D) in model units -> features (B, L, F)."""
        return torch.stack([self.encode_layer(of_layer, s) for s, of_layer in enumerate(x.unbind(1))], 1)

    def decode(self, features: Tensor, x: Tensor) -> Tensor:
        """features (B, L, F) and residual streams x (B, L, D) -> MLP outputs yhat (B, L, D), in model units."""
        of_layers = features.unbind(1)
        return torch.stack([self.decode_layer(of_layers, x[:, layer], layer) for layer in range(self.n_layers)], 1)

    def forward(self, x: Tensor) -> Tensor:
        """Residual streams x (B, L, D) -> MLP outputs yhat (B, L, D), both in model units."""
        return self.decode(self.encode(x), x)

    def dense_decoder(self) -> Tensor:
        """The masked square decoder (L, L, F, D) of the papers, [source, target]: for tests, half of it is zeros."""
        dense = self.b_dec.new_zeros(self.n_layers, self.n_layers, self.d_features, self.d_acts)
        for s, weight in enumerate(self.W_dec):
            dense[s, s : s + weight.shape[1]] = weight.transpose(0, 1)
        return dense

    def layer(self, s: int) -> dict[str, Tensor]:
        """One layer's W_enc (D, F), b_enc, threshold (F,), W_dec (F, T, D), b_dec (D,); with `skip`, W_skip (D, D)."""
        skip = {} if self.W_skip is None else {"W_skip": self.W_skip[s]}
        encoder = {"W_enc": self.W_enc[s], "b_enc": self.b_enc[s], "threshold": self.threshold[0, s]}
        return encoder | {"W_dec": self.W_dec[s], "b_dec": self.b_dec[s]} | skip

    def fold(self) -> CrossLayerTranscoder:
        """The same function without normalisation, which is folded into the weights. Raises as `fold_layer`."""
        spec = replace(self.spec, normalization="none")
        folded = CrossLayerTranscoder(self.n_layers, self.d_acts, spec, sites=self.sites).to(self.b_dec.device)
        for s in range(self.n_layers):
            into = folded.layer(s)
            for name, tensor in self.fold_layer(s).items():
                into[name].detach().copy_(tensor)
        return folded

    @torch.no_grad()
    def fold_layer(self, s: int) -> dict[str, Tensor]:
        """`layer` of the same function without normalisation: folded in float64, then float32.

        Raises ValueError for `token`, which is not an affine map, and for `by_norm`, whose norms folding changes.
        """
        if self.spec.by_norm:
            raise ValueError("clt.by_norm compares decoder norms, which folding changes; convert it to jumprelu first")
        norm = self.normalization
        if norm.kind == "token":
            raise ValueError("normalization 'token' is not affine and cannot be folded; train with 'layer' or 'dim'")
        mean, sd = norm.input_mean[s].double(), norm.input_sd[s].double().unsqueeze(-1)
        target_mean, target_sd = norm.target_mean[s].double(), norm.target_sd.double()
        found = {name: tensor.double() for name, tensor in self.layer(s).items()}
        W_enc = found["W_enc"] / sd
        found |= {"W_enc": W_enc, "b_enc": found["b_enc"] - mean @ W_enc}
        found["W_dec"] = found["W_dec"] * target_sd[s : s + found["W_dec"].shape[1]]  # the target layers' scale
        found["b_dec"] = found["b_dec"] * target_sd[s] + target_mean
        if "W_skip" in found:
            found["W_skip"] = found["W_skip"] / sd * target_sd[s]
            found["b_dec"] = found["b_dec"] - mean @ found["W_skip"]
        return {name: tensor.float() for name, tensor in found.items()}

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `config.json` and `model.safetensors`."""
        from safetensors.torch import save_file

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        save_file({k: v.detach().contiguous() for k, v in self.state_dict().items()}, directory / "model.safetensors")
        (directory / "config.json").write_text(json.dumps(self.config, indent=2, allow_nan=False) + "\n")

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, *, revision: str | None = None, lazy: bool = False
    ) -> CrossLayerTranscoder:
        """Read what `save_pretrained` or `clt import` wrote, or what `clt push` put on the hub as `user/name`.

        Of a run it reads the newest checkpoint. A directory of that name wins. revision: a branch, tag or commit on the
        hub.

        lazy: W_enc and W_dec are read a layer at a time, by the methods that work on one layer: one layer of a large
        transcoder fits where the whole does not. It cannot be trained or saved.

        Raises UserError as `local_directory`, when a file is missing or damaged, when the two do not agree (before
        memory is taken for what config.json says), and for values that no training leaves: nan, inf, scales that are
        not positive.
        """
        directory = local_directory(directory, revision)
        config = directory / "config.json"
        remedy = "copy it again from where save_pretrained wrote it, or take an earlier checkpoint"
        of_spec, of_sites, size = hints(CLTConfig), hints(Sites), Annotated[int, POSITIVE]
        fields = of_spec | of_sites
        tree = read_object(config, {"n_layers": size, "d_acts": size}, remedy)
        with reading(config, remedy):
            L, D = tree.pop("n_layers"), tree.pop("d_acts")
            if odd := tree.keys() - fields.keys():
                raise ValueError(f"unknown {', '.join(map(shown, sorted(odd)))}; wanted {', '.join(fields)}")
            values = {name: fit(name, fields[name], value) for name, value in tree.items()}
            spec = CLTConfig(**{name: values[name] for name in values.keys() & of_spec.keys()})
            sites = Sites(**{name: values[name] for name in values.keys() & of_sites.keys()})
            check_rule(spec, L)
        files = TensorFiles(directory, remedy)
        with reading(files.main, remedy):
            _compare(files.shapes, {"W_enc": [L, D, spec.d_features], f"W_dec.{L - 1}": [spec.d_features, 1, D]})
            with torch.device("meta"):
                model = cls(L, D, spec, sites=sites)
            shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
            _compare(files.shapes, dict.fromkeys(files.shapes) | shapes)
        if lazy:
            model._read_on_demand(files)
        model = model.to_empty(device="cpu")
        model.load_state_dict({name: files.read(name, check=check_values) for name in model.state_dict()})
        return model

    def _read_on_demand(self, files: TensorFiles) -> None:
        """Put readers in the place of W_enc and W_dec."""
        del self.W_enc, self.W_dec
        read, L = partial(files.read, check=check_values), self.n_layers
        self.W_enc = _OnDemand(lambda layer: read("W_enc", layer), L)  # type: ignore[assignment]
        self.W_dec = _OnDemand(lambda layer: read(f"W_dec.{layer}"), L)  # type: ignore[assignment]


class _OnDemand(nn.Module):
    """A weight's layers, each read when it is asked for. The last one read is kept, and dropped before the next."""

    place: Tensor

    def __init__(self, read: Callable[[int], Tensor], layers: int) -> None:
        super().__init__()
        self.read, self.layers = read, layers
        self.layer, self.kept = -1, torch.empty(0)
        # Goes where the transcoder goes, and says so. (Readers that asked the transcoder would keep it in memory.)
        self.register_buffer("place", torch.empty(0), persistent=False)

    def __len__(self) -> int:
        return self.layers

    def __getitem__(self, layer: int) -> Tensor:
        if not 0 <= layer < self.layers:
            raise IndexError(layer)
        if layer != self.layer:
            self.kept = torch.empty(0)
            # First to the device: a GPU widens to float32 faster, and half as much is copied.
            self.kept, self.layer = self.read(layer).to(self.place.device).to(self.place.dtype), layer
        return self.kept


def _compare(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    if odd := mismatches(found, wanted):
        raise ValueError(f"not the tensors of config.json: {odd}")


def check_values(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless the tensor can be one of a transcoder's. Thresholds may be negative."""
    if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{name} is {tensor.dtype}, wanted floating-point numbers of 16 to 64 bits")
    if not tensor.numel():
        raise ValueError(f"{name} is empty")
    low, high = tensor.aminmax()  # of a tensor with a nan both are nan
    if not (low.isfinite() and high.isfinite()):
        raise ValueError(f"{name} has a value that is nan or inf")
    if name.endswith("_sd") and low <= 0:
        raise ValueError(f"{name} has the value {low.item():g}, wanted positive scales")


def uniform(bound: float, *shape: int) -> Tensor:
    """A tensor drawn from U(-bound, bound)."""
    return torch.empty(shape).uniform_(-bound, bound)
