"""EDM's networks once more, as plainly as the papers tell them, on tensors under EDM's names: what ours is held to.

Song et al. 2021 (DDPM++, NCSN++), Dhariwal & Nichol 2021 (ADM), Karras et al. 2022 (eq. 7, tables 1 and 7). NCHW, one
function per layer, explicit filters, attention as two products; nothing of fastdmd is used. `network` walks the layers
once and asks `weights` for each tensor by name and shape: so the same walk makes random weights and applies given ones.
"""

import math

import torch
from torch.nn import functional as F

DEFAULTS = {
    "label_dim": 0,
    "sigma_data": 0.5,
    "augment_dim": 0,
    "channel_mult_emb": 4,
    "embedding_type": "positional",
    "channel_mult_noise": 1,
    "encoder_type": "standard",
    "resample_filter": [1, 1],
}


class Weights:
    """Tensors by name; those that are not there yet are drawn if a generator is given."""

    def __init__(self, tensors, generator=None):
        self.tensors, self.generator, self.used = tensors, generator, set()

    def __call__(self, name, *shape):
        name = f"model.{name}"
        if self.generator is not None and name not in self.tensors:
            values = torch.randn(shape, generator=self.generator, dtype=torch.float64)
            if name.endswith("freqs"):
                values = 16 * values
            elif len(shape) == 1:
                values = 0.2 * values + ("norm" in name and name.endswith("weight"))
            else:
                values = values * math.prod(shape[1:]) ** -0.5
            self.tensors[name] = values.float()
        self.used.add(name)
        assert self.tensors[name].shape == shape, name
        return self.tensors[name]


def random_state(config, seed=0):
    """Float32 tensors for a network of this configuration, resampling filters included."""
    generator = torch.Generator().manual_seed(seed)
    weights = Weights({}, generator)
    x = torch.zeros(1, config["img_channels"], config["img_resolution"], config["img_resolution"])
    denoise(
        config,
        weights,
        x,
        torch.ones(1),
        torch.zeros(1, config.get("label_dim", 0)),
        torch.zeros(1, config.get("augment_dim", 0)),
    )
    taps = torch.tensor(config.get("resample_filter", [1, 1])).float()
    kernel = (taps[:, None] * taps / taps.sum() ** 2)[None, None]
    for name in list(weights.tensors):
        if name.endswith(("_down.conv0.weight", "_up.conv0.weight")):
            weights.tensors[name.replace("weight", "resample_filter")] = kernel
            weights.tensors[name.replace("conv0.weight", "skip.resample_filter")] = kernel
        if name.endswith("aux_residual.weight"):
            weights.tensors[name.replace("weight", "resample_filter")] = kernel
    return weights.tensors


def denoise(config, weights, x, sigma, class_labels=None, augment_labels=None):
    """`D_x` of eq. 7; class_labels one-hot, augment_labels None for images as they are."""
    c = {**DEFAULTS, **config}
    sd, s = c["sigma_data"], sigma[:, None, None, None]
    root = (s**2 + sd**2).sqrt()
    F_x = network(c, weights, x / root, sigma.log() / 4, class_labels, augment_labels)
    return sd**2 / root**2 * x + s * sd / root * F_x


def network(c, weights, x, c_noise, class_labels, augment_labels):
    adm = c["model_type"] == "DhariwalUNet"
    width, emb_width = c["model_channels"], c["model_channels"] * c["channel_mult_emb"]
    noise_width = width * c["channel_mult_noise"]
    taps = torch.tensor(c["resample_filter"], dtype=x.dtype)
    kernel, border = taps[:, None] * taps / taps.sum() ** 2, (len(taps) - 1) // 2
    skip_scale = 1.0 if adm else 0.5**0.5
    eps = 1e-5 if adm else 1e-6

    def linear(name, y, n, bias=True):
        y = y @ weights(f"{name}.weight", n, y.shape[1]).t()
        return y + weights(f"{name}.bias", n) if bias else y

    def conv(name, y, n, size=3):
        w, b = weights(f"{name}.weight", n, y.shape[1], size, size), weights(f"{name}.bias", n)
        return F.conv2d(y, w, b, padding=size // 2)

    def norm(name, y):
        n = y.shape[1]
        return F.group_norm(y, min(32, n // 4), weights(f"{name}.weight", n), weights(f"{name}.bias", n), eps)

    def filtered(y, function, factor, border):
        """Every channel by itself."""
        z = function(y.flatten(0, 1)[:, None], factor * kernel[None, None], stride=2, padding=border)
        return z.unflatten(0, y.shape[:2])[:, :, 0]

    def resample(y, direction):
        return filtered(y, F.conv2d, 1, border) if direction == "down" else filtered(y, F.conv_transpose2d, 4, border)

    def block(name, y, n, *, direction=None, attention=False):
        skip, n_in = y, y.shape[1]
        y = F.silu(norm(f"{name}.norm0", y))
        if direction:
            y, skip = resample(y, direction), resample(skip, direction)
        y = conv(f"{name}.conv0", y, n)
        if adm:
            scale, shift = linear(f"{name}.affine", emb, 2 * n)[:, :, None, None].split(n, dim=1)
            y = F.silu(norm(f"{name}.norm1", y) * (1 + scale) + shift)
        else:
            y = F.silu(norm(f"{name}.norm1", y + linear(f"{name}.affine", emb, n)[:, :, None, None]))
        y = conv(f"{name}.conv1", y, n)
        if n_in != n or (direction and not adm):
            skip = conv(f"{name}.skip", skip, n, size=1)
        y = (y + skip) * skip_scale
        heads = n // 64 if adm else 1  # a level too narrow for one head does not attend
        if attention and heads:
            qkv = conv(f"{name}.qkv", norm(f"{name}.norm2", y), 3 * n, size=1)
            B, _, H, W = y.shape
            q, k, v = qkv.reshape(B * heads, n // heads, 3, H * W).unbind(2)  # each [B heads, C, HW]
            a = (q.transpose(1, 2) @ k / (n // heads) ** 0.5).softmax(dim=2)
            y = (conv(f"{name}.proj", (v @ a.transpose(1, 2)).reshape(B, n, H, W), n, size=1) + y) * skip_scale
        return y

    # The noise level and the labels; float32 angles, as everywhere.
    if c["embedding_type"] == "fourier":
        angle = c_noise.float()[:, None] * (2 * math.pi * weights("map_noise.freqs", noise_width // 2))
        emb = [angle.sin(), angle.cos()]
    else:
        exponent = torch.arange(noise_width // 2).float() / (noise_width // 2 - (0 if adm else 1))
        angle = c_noise.float()[:, None] * (1 / 10000) ** exponent
        emb = [angle.cos(), angle.sin()] if adm else [angle.sin(), angle.cos()]
    emb = torch.cat(emb, dim=1).to(x.dtype)
    if c["label_dim"] and not adm:
        emb = emb + linear("map_label", class_labels * c["label_dim"] ** 0.5, noise_width)
    if c["augment_dim"] and augment_labels is not None:
        emb = emb + linear("map_augment", augment_labels, noise_width, bias=False)
    emb = linear("map_layer1", F.silu(linear("map_layer0", emb, emb_width)), emb_width)
    if c["label_dim"] and adm:
        emb = emb + linear("map_label", class_labels, emb_width, bias=False)
    emb = F.silu(emb)

    size = c["img_resolution"]
    aux, x = x, conv(f"enc.{size}x{size}_conv", x, width * c["channel_mult"][0] if adm else width)
    skips = [x]
    for level, factor in enumerate(c["channel_mult"]):
        if level:
            size //= 2
            n = x.shape[1]
            x = block(f"enc.{size}x{size}_down", x, n, direction="down")
            if c["encoder_type"] == "residual":
                name = f"enc.{size}x{size}_aux_residual"
                # Convolution and filter, with zeros outside of the image for both: so the padding comes first.
                padded = F.pad(aux, [1 + border] * 4)
                aux = filtered(F.conv2d(padded, weights(f"{name}.weight", n, aux.shape[1], 3, 3)), F.conv2d, 1, 0)
                x = aux = (x + aux + weights(f"{name}.bias", n)[:, None, None]) * 0.5**0.5
            skips.append(x)
        for index in range(c["num_blocks"]):
            attention = size in c["attn_resolutions"]
            x = block(f"enc.{size}x{size}_block{index}", x, width * factor, attention=attention)
            skips.append(x)
    x = block(f"dec.{size}x{size}_in0", x, x.shape[1], attention=True)
    x = block(f"dec.{size}x{size}_in1", x, x.shape[1])
    for level, factor in reversed(list(enumerate(c["channel_mult"]))):
        if level < len(c["channel_mult"]) - 1:
            size *= 2
            x = block(f"dec.{size}x{size}_up", x, x.shape[1], direction="up")
        for index in range(c["num_blocks"] + 1):
            attention = size in c["attn_resolutions"] and (adm or index == c["num_blocks"])
            x = torch.cat([x, skips.pop()], dim=1)
            x = block(f"dec.{size}x{size}_block{index}", x, width * factor, attention=attention)
    last = "out" if adm else f"dec.{size}x{size}_aux"
    return conv(f"{last}_conv", F.silu(norm(f"{last}_norm", x)), c["img_channels"])
