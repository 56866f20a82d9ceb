"""What a training step costs each rank, on paper: parameters, memory, FLOPs, bytes moved and bytes sent.

F features a layer and B tokens a step over all ranks, on a (data, feature) grid: each of `feature` ranks holds F /
feature features of every layer, each of `data` groups reads B / data rows. tests/test_costs.py holds the formulas
against what small steps really take. Not counted: the allocator's fragmentation, CUDA's and NCCL's own buffers,
elementwise arithmetic, evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOAT = 4  # bytes: master weights, gradients, moments, errors, penalty


@dataclass(frozen=True)
class Job:
    """A training step: its sizes, its objective, and how it is spread over ranks."""

    n_layers: int
    d_acts: int
    d_features: int
    batch_tokens: int
    data: int = 1
    feature: int = 1
    width: int = 2  # bytes of a multiplied number (bf16: 2)
    stored: int = 2  # bytes of a stored one
    accumulate: int = 1  # micro-batches
    activation: str = "jumprelu"
    k: int = 0  # the largest of the run
    by_norm: bool = False
    window: int | None = None  # layers that a feature writes to; None: all later ones
    skip: bool = False
    pre_activation: bool = False
    aux_k: int = 0  # 0: no AuxK
    dead: float = 0.0  # the share of features that are dead, with AuxK
    row_adam: bool = False  # `optim.decoder` is not torch

    @property
    def local(self) -> tuple[int, int, int, int]:
        """L, D, and a rank's own features F and tokens B."""
        return self.n_layers, self.d_acts, self.d_features // self.feature, -(-self.batch_tokens // self.data)

    @property
    def micro(self) -> int:
        """Tokens that a rank computes at once."""
        return -(-self.local[3] // self.accumulate)

    @property
    def reach(self) -> list[int]:
        """How many layers the features of each layer write to."""
        L = self.n_layers
        return [min(self.window or L, L - s) for s in range(L)]


def decoder_parameters(job: Job) -> int:
    """Of one rank: sum over source layers s of F * T_s * D, T_s the layers that s writes to."""
    _, D, F, _ = job.local
    return F * D * sum(job.reach)


def parameters(job: Job) -> int:
    """Of one rank: encoder, its bias and thresholds, decoder; every rank has the whole decoder bias and skip."""
    L, D, F, _ = job.local
    return L * D * F + 2 * L * F + decoder_parameters(job) + L * D + job.skip * L * D * D


def trained_parameters(job: Job) -> int:
    """Of one rank: those with a gradient. Only jumprelu learns its thresholds."""
    L, _, F, _ = job.local
    return parameters(job) - (0 if job.activation == "jumprelu" else L * F)


def optimizer_bytes(job: Job) -> int:
    """Adam's two moments, and a step counter for each of W_enc, b_enc, b_dec, threshold, W_skip and L decoders."""
    tensors = job.n_layers + 3 + (job.activation == "jumprelu") + job.skip
    return 2 * FLOAT * trained_parameters(job) + FLOAT * tensors


def state_bytes(job: Job) -> int:
    """What lives from step to step: float32 weights, gradients (DDP's buckets) and moments, 16 bytes a parameter."""
    return FLOAT * (parameters(job) + trained_parameters(job)) + optimizer_bytes(job) + row_adam_bytes(job)


def row_adam_bytes(job: Job) -> int:
    """What `RowAdam` keeps: the decoder in the products' dtype, and of each row its norm, its last step, two sums and
    their gradients."""
    if not job.row_adam:
        return 0
    L, _, F, _ = job.local
    copy = job.width * decoder_parameters(job) if _widened(job) else 0
    return copy + 6 * FLOAT * L * F


def batch_bytes(job: Job) -> int:
    """This step's rows as they are stored, and the next step's, which are copied meanwhile."""
    L, D, _, B = job.local
    return 2 * (2 * B * L * D * job.stored)


def saved_bytes(job: Job) -> int:
    """Kept by the forward pass for the backward pass, parameters and batch not counted again.

    (L, B, F): the encoder's products. (L, B, D): normalised inputs and reconstruction, which features that are spread
    over ranks add up in float32. (L, F): the decoder's norms. (L, B): the thresholds of topk. And AuxK's.
    """
    L, D, F, _ = job.local
    B, reconstruction = job.micro, FLOAT if job.feature > 1 else job.width
    saved = L * B * F * job.width + L * B * D * (job.width + reconstruction) + FLOAT * L * F
    saved += FLOAT * L * B if job.activation == "topk" else 0
    if job.aux_k:
        saved += FLOAT * L * B * D + sum(_auxk_saved(job))
    return saved


def _auxk_saved(job: Job) -> list[int]:
    """By layer: pre-activations, slopes and features of the dead, their decoders and numbers. Beside it, the error."""
    _, D, F, _ = job.local
    dead = int(job.dead * F)
    return [dead * (job.micro * (2 * FLOAT + job.width) + T * D * job.width + 8) for T in job.reach]


def backward_bytes(job: Job) -> int:
    """The most that a step holds at once beyond `state_bytes` and the batch, without torch.compile, which holds less.

    With `batchtopk`, of the search that a GPU makes: a CPU also collects candidates. With AuxK and many dead features,
    up to a quarter less than this.
    """
    return max(*_forward_peaks(job), *_auxk_peaks(job), *_backward_peaks(job))


def _forward_peaks(job: Job) -> list[int]:
    """At the last layer: all features, what was saved, and beside them that layer's features again and all decoders to
    it, or (B, F) in float32 four times, for the pass over the features. At the squared error: three float32 tensors of
    (L, B, D) beside what was saved, four at AuxK's. At the skip connection: its weights again.
    """
    L, D, F, _ = job.local
    saved, matrix = saved_bytes(job), job.micro * F
    decoders = max(job.reach) * F * D * job.width
    decode = max(matrix * job.width + decoders, 4 * FLOAT * matrix + (_widened(job) and job.width * matrix))
    errors = (4 if job.aux_k else 3) * FLOAT * L * job.micro * D
    skip = job.skip * L * D * D * (job.width if _widened(job) else 0)
    before = saved - (FLOAT * L * job.micro * D + sum(_auxk_saved(job)) if job.aux_k else 0)  # AuxK comes later
    return [saved + errors, before + L * matrix * job.width + decode, saved + skip]


def _auxk_peaks(job: Job) -> list[int]:
    """In AuxK's backward pass at each layer, which comes before all others: what it and the rest have saved, the
    gradient of its error twice, and whole gradients to this and the later layers' decoders and products, however few
    features are dead; beside them, the gradient to the dead decoders or pre-activations.
    """
    if not job.aux_k:
        return [0]
    L, D, F, _ = job.local
    matrix, dead, of_layers = job.micro * F, int(job.dead * F), _auxk_saved(job)
    rest = saved_bytes(job) - sum(of_layers) + FLOAT * L * job.micro * D
    peaks = []
    for s, T in enumerate(job.reach):
        whole = FLOAT * F * D * sum(job.reach[s:]) + (L - 1 - s) * matrix * job.width
        own = max(dead * T * D * (FLOAT + _widened(job) // 2), 4 * FLOAT * dead * job.micro + matrix * job.width)
        peaks.append(rest + sum(of_layers[: s + 1]) + whole + own)
    return peaks


def _backward_peaks(job: Job) -> list[int]:
    """In the backward pass at each layer: the earlier layers' products and the gradients of the later layers'
    pre-activations, the inputs, the gradient of y~ and the decoders' norms, and beside them either (B, F) in float32
    eight times (seven where nothing is learned of thresholds; up to three more with the pre-activation loss), or the
    layer's own gradients. AuxK's whole gradients to this and the earlier layers wait to be added. From the second
    micro-batch on, the gradient to a parameter is not written into its place, but beside it.
    """
    L, D, F, _ = job.local
    matrix, wide = job.micro * F, _widened(job)
    pair = (job.width + (FLOAT if job.feature > 1 else job.width)) * L * job.micro * D  # x~, and the gradient of y~
    held = L * matrix * job.width + pair + FLOAT * L * F
    floats = 8 if job.activation == "jumprelu" or (job.activation == "topk" and job.by_norm) else 7
    floats += job.pre_activation * (2 if wide else 3)
    again = FLOAT if job.accumulate > 1 else 0
    peaks = [held + again * L * D * F]
    for s, T in enumerate(job.reach):
        waiting = (s + 1) * matrix * job.width + FLOAT * F * D * sum(job.reach[: s + 1]) if job.aux_k else 0
        gating = matrix * (job.width + floats * FLOAT + (wide and 2 * job.width))
        own = 3 * matrix * job.width + F * T * D * (job.width + wide + again)
        peaks.append(held + waiting + max(gating, own))
    return peaks


def _widened(job: Job) -> int:
    """Bytes of the float32 beside each number that is narrower."""
    return FLOAT if job.width < FLOAT else 0


def memory_bytes(job: Job) -> int:
    """What a step needs at its peak: weights, gradients, moments, what it works in, and the batches."""
    return state_bytes(job) + backward_bytes(job) + batch_bytes(job)


def flops(job: Job) -> int:
    """Of one rank's matrix products: 6 a decoder weight and token, 4 an encoder or skip weight (no input gradient)."""
    L, D, F, B = job.local
    auxk = int(job.dead * F) * D * sum(job.reach) if job.aux_k else 0
    return B * (6 * (decoder_parameters(job) + auxk) + 4 * (L * D * F + job.skip * L * D * D))


def moved_bytes(job: Job) -> int:
    """The least that a step reads and writes of a rank's memory besides its matrix products' operands.

    Adam reads weight, gradient and two moments and writes three (28 bytes a parameter), the gradient's norm reads it
    (4), a cast to `width` reads 4 and writes `width`. Pre-activations, features and their gradient are each written
    and read, and the batch is read, as float32.
    """
    L, D, F, B = job.local
    cast = 4 + job.width if _widened(job) else 0
    return parameters(job) * (28 + 4 + cast) + 6 * B * L * F * job.width + 2 * B * L * D * 4


def ring_bytes(size: int, ranks: int) -> int:
    """What each rank sends (and receives) in an all-reduce of `size` bytes over a ring."""
    return 2 * (ranks - 1) * size // ranks


def gradient_bytes(job: Job) -> int:
    """Sent by a rank to sum its float32 gradients over the data dimension, once a step."""
    return ring_bytes(FLOAT * trained_parameters(job), job.data)


def reconstruction_bytes(job: Job) -> int:
    """Sent by a rank over the feature dimension, in the forward pass alone: to sum the float32 partial y~ (B, L, D),
    AuxK's too, and to share the k + 1 largest scores of a token and layer with `topk` and AuxK.
    """
    L, D, _, B = job.local
    sums = (1 + (job.aux_k > 0)) * D
    largest = (job.k + 1 if job.activation == "topk" else 0) + (job.aux_k + 1 if job.aux_k else 0)
    return ring_bytes(FLOAT * B * L * (sums + largest * job.feature), job.feature)
