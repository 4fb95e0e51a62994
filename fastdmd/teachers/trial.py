"""A foreign network, tried before anything is done with it: forward, and backward where it is to be trained."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastdmd.diffusion import DenoisingNetwork, per_sample, preconditioning
from fastdmd.distill.step_codes import can_be_told, codes_of, tell_steps
from fastdmd.networks.accelerate import accelerate
from fastdmd.networks.user_code import user_code
from fastdmd.optim.flat import check_network

VERIFIED_SIGMAS = (0.002, 0.5, 5.0)
# A denoiser returns an image without noise as it is, and at the greatest of these levels it errs about as the best
# linear one does (c_out of EDM). The embedded teacher, recast: under its own name it changes 1 % and errs 1.9 times as
# much; 320 % where another network claims x0, 12 to 18 times where it claims epsilon; most other confusions come to 1.8
# to 3.2 and are not told from a good teacher on images that it does not know.
TOLERATED_CHANGE, TOLERATED_ERROR = 0.5, 3.0


@torch.no_grad()
def verify(denoiser: DenoisingNetwork, generator_sigmas: tuple[float, ...] | None = None) -> None:
    """Runs a denoiser once, on smooth images with noise of three levels; a generator at its own.

    Raises ValueError if it fails, if what its network gives is not floating point of the images' shape, or not finite,
    or if it changes its input. Warns where what it gives is not what a denoiser would give: it may be a network of
    another parameterization, or one that is not trained.
    """
    sigmas = VERIFIED_SIGMAS if generator_sigmas is None else generator_sigmas * 2
    images, inputs = _trial(denoiser, sigmas)
    device, name = next(denoiser.parameters()).device, denoiser.foreign_name
    passed = [tensor.to(device, copy=True) for tensor in inputs]
    shapes = _shapes(inputs)
    with user_code("teachers", f"{name} to denoise {shapes}"):
        D_x = denoiser(*passed)
    for before, after, argument in zip(inputs, passed, ("x", "sigma", "labels"), strict=False):
        if not torch.equal(before, after.cpu()):
            raise ValueError(f"fastdmd.teachers: expected {name} to leave its input as it is, got another {argument}")
    D_x = D_x.cpu()
    if not D_x.isfinite().all():
        levels = sorted({level for level, D in zip(sigmas, D_x, strict=True) if not D.isfinite().all()})
        raise ValueError(f"fastdmd.teachers: expected finite images of {name}, got NaN or infinity at sigma {levels}")
    if generator_sigmas is not None:
        return
    sigma = inputs[1]
    change = ((D_x - inputs[0])[0].norm() / inputs[0][0].norm()).item()
    c_out = preconditioning(sigma, denoiser.sigma_data)[1]
    error = ((D_x - images)[-1].square().mean().sqrt() / c_out[-1]).item()
    if change > TOLERATED_CHANGE or error > TOLERATED_ERROR:
        warnings.warn(
            f"{name} does not denoise as --parameterization {denoiser.parameterization}: it changes an image without "
            f"noise by {change:.0%}, and at sigma {VERIFIED_SIGMAS[-1]:g} errs {error:.1f} times as much as the best "
            "linear denoiser. Expected of a network that is not trained; else its parameterization is another",
            stacklevel=2,
        )


def accelerate_network(denoiser: DenoisingNetwork) -> str:
    """Lets somebody's network compute with our ops, in place; says what of it does, or why it does not, in one line."""
    device, calls = next(denoiser.parameters()).device, []
    _, inputs = _trial(denoiser, VERIFIED_SIGMAS[1:])
    hook = denoiser.inner.register_forward_pre_hook(lambda _, arguments: calls.append(arguments))
    try:
        with torch.no_grad(), user_code("accelerate", f"{denoiser.foreign_name} to denoise {_shapes(inputs)}"):
            denoiser(*(tensor.to(device) for tensor in inputs))
            hook.remove()
            return str(accelerate(denoiser.inner, *calls[0]))
    except ValueError as error:  # distillation and sampling say what they need themselves
        return f"not accelerated; {error}"
    finally:
        hook.remove()


def verify_training(network: DenoisingNetwork) -> None:
    """Copies somebody's network and takes a gradient of the copy, as its distillation does; nothing of it is kept.

    Raises ValueError or TypeError if either fails, if its parameters are none that `AdamWEMA` takes, if the copy shares
    any with the network, and where none gets a gradient. The batch is another than in `verify`.
    """
    if not network.foreign_name:
        return
    name, device = network.foreign_name, next(network.parameters()).device
    _, inputs = _trial(network, VERIFIED_SIGMAS[1:])
    with user_code("teachers", f"{name} to be copied and trained"):
        twin = copy.deepcopy(network).requires_grad_(True)
        check_network(twin)
        copy.deepcopy(twin).requires_grad_(False)  # its average
    places = {parameter.data_ptr() for parameter in network.parameters() if parameter.numel()}
    if shared := [own for own, parameter in twin.inner.named_parameters() if parameter.data_ptr() in places]:
        raise ValueError(f"fastdmd.teachers: expected a copy of {name} with weights of its own, got {shared[0]} shared")
    with torch.enable_grad(), user_code("teachers", f"a gradient of {name} for {_shapes(inputs)}"):
        D_x = twin(*(tensor.to(device) for tensor in inputs))
        is_on = torch.is_grad_enabled()
        if D_x.requires_grad:
            D_x.square().mean().backward()
    if not is_on:
        raise ValueError(f"fastdmd.teachers: expected {name} to leave gradients on, got set_grad_enabled(False)")
    if all(parameter.grad is None for parameter in twin.parameters()):
        raise ValueError(
            f"fastdmd.teachers: expected a gradient for the parameters of {name}, got none: of no_grad, inference_mode "
            "or detach, or of a copy that computes with the weights of another"
        )
    if device.type == "cuda":
        torch.cuda.empty_cache()  # for those who ask how much is free


def verify_features(network: DenoisingNetwork) -> None:
    """Takes the features of somebody's encoder, and their gradient in the images, as an adversarial term does.

    Raises ValueError if either fails, if the features are not of its `feature_shape`, not finite or without gradient.
    """
    _verify_gradient(network, "features", lambda *inputs: network.with_features(*inputs, num_denoised=0)[1])


def verify_derivative(network: DenoisingNetwork) -> None:
    """Takes the gradient of what somebody's network denoises in the images, as score identity distillation does.

    Raises ValueError if that fails, and for images that are not finite or without gradient.
    """
    _verify_gradient(network, "denoised images", network)


@torch.no_grad()
def verify_level_embedding(network: DenoisingNetwork) -> str | None:
    """Tells a copy of somebody's network which step of a generator its images are of, as a distillation does; says, in
    one line, where it has no `level_embedding` for that and so will not be told.

    Raises ValueError for one that gives no `[B, width]`, that its forward does not call, or that it calls with other
    rows than those of the batch, in their order. What no code changes, as of a network that is not trained, passes.
    """
    if not network.foreign_name:
        return None
    name, device = network.foreign_name, next(network.parameters()).device
    if not can_be_told(network):
        return (
            f"the fake score is not told which step of the generator it judges, as {name} has no level_embedding with "
            "a Linear last; several steps learn better with one"
        )
    _, inputs = _trial(
        network, [VERIFIED_SIGMAS[level] for level in (2, 1, 1, 2, 1, 2)]
    )  # neither sorted nor different
    x, sigma, *labels = (tensor.to(device) for tensor in inputs)
    calls: list[int] = []
    changed = []
    with user_code("teachers", f"{name} to be copied and told of 3 steps"):
        twin = copy.deepcopy(network)
        tell_steps(twin, 3)
        assert twin.level_embedding is not None
        twin.level_embedding.register_forward_hook(lambda *_: calls.append(1))
        before = twin(x, sigma, *labels)
        for step in range(3):
            for codes in (twin.get_parameter(own) for own in codes_of(twin.state_dict())):
                codes.zero_()[step] = torch.linspace(-1, 1, codes.shape[1])
            changed.append((twin(x, sigma, *labels) != before).flatten(1).any(1).cpu())
    found = torch.stack(changed)  # [3, 6]
    expected = torch.arange(3)[:, None] == torch.arange(len(x)) % 3
    if not calls or (found.any() and not torch.equal(found, expected)):
        got = "one with other rows" if calls else "one that it does not call"
        raise ValueError(
            f"fastdmd.teachers: expected {name}'s level_embedding to be called by its forward, with the rows of the "
            f"batch in their order, got {got}; under another name it is left alone"
        )
    return None


def _verify_gradient(network: DenoisingNetwork, what: str, function: Callable[..., Tensor]) -> None:
    if not network.foreign_name:
        return
    name, device = network.foreign_name, next(network.parameters()).device
    _, inputs = _trial(network, VERIFIED_SIGMAS[1:])
    x, *others = (tensor.to(device) for tensor in inputs)
    x.requires_grad_(True)
    with torch.enable_grad(), user_code("teachers", f"{what} of {name} for {_shapes(inputs)}"):
        result = function(x, *others)
        if result.requires_grad:
            result.square().mean().backward(inputs=[x])
    if not result.isfinite().all():
        raise ValueError(f"fastdmd.teachers: expected finite {what} of {name}, got NaN or infinity")
    if x.grad is None or not x.grad.any():
        raise ValueError(f"fastdmd.teachers: expected a gradient of {name}'s {what} in the images, got none")


def _trial(denoiser: DenoisingNetwork, sigmas: Sequence[float]) -> tuple[Tensor, list[Tensor]]:
    """Smooth images `[B, C, H, W]`, and the inputs of the denoiser for them, one of each level."""
    C, H, W = denoiser.image_shape
    B = len(sigmas)
    generator = torch.Generator().manual_seed(0)
    images = F.interpolate(torch.randn(B, C, 4, 4, generator=generator), (H, W), mode="bilinear")
    images = images * (denoiser.sigma_data / images.std())
    noise = torch.randn(images.shape, generator=generator)
    sigma = torch.tensor(sigmas)
    class_labels = [torch.arange(B) % denoiser.num_classes] if denoiser.num_classes else []
    return images, [images + per_sample(sigma) * noise, sigma, *class_labels]


def _shapes(inputs: Iterable[Tensor]) -> str:
    return ", ".join(f"{tuple(tensor.shape)} of {tensor.dtype}" for tensor in inputs)
