"""The operations on quantized weights: one implementation behind an eager path, an autograd.Function and torch.library.

    linear(x, weight, bias, side, side_weight)      y  = x W^T + side side_weight^T + bias
    lora_linear(x, weight, bias, A, B, scaling)     y  = x W^T + (scaling x A^T) B^T + bias
    lora_linear(..., mask)                          y  = x W^T + (scaling x A^T * mask) B^T + bias
    grad_input(g, weight, side, side_weight)        dx = g W   + side side_weight

LoRA (arXiv 2106.09685) is an extension of the contraction, [x, s x A^T] [W, B]^T forward and [g, s g B] [W; A]
backward, so the kernel adds it in the same pass over the output. Several adapters in one batch are a wider A and B,
with each row of x masked to the columns of its own.

Eager calls take the plain body (no gradient) or one autograd.Function (gradient, torch.func.grad); tracing, dispatch
modes and tensor subclasses go through the registered operators `torch.ops.nybble.*`, whose dispatch costs several times
as much. Under autocast inputs are cast to its dtype, as for nn.Linear. Second derivatives are right; forward-mode
differentiation and vmap are refused by torch with an error.
"""

from __future__ import annotations

from .operators import registered  # noqa: F401  (registers torch.ops.nybble)
from .operators.arguments import check_args, check_lora
from .operators.bodies import scaled, side_factor, spread
from .operators.calls import grad_input, linear, lora_gradients, lora_linear
from .operators.routes import autocast_enabled

__all__ = [
    "autocast_enabled",
    "check_args",
    "check_lora",
    "grad_input",
    "linear",
    "lora_gradients",
    "lora_linear",
    "scaled",
    "side_factor",
    "spread",
]
