"""Turns never wait for the host: whole ones on fake CUDA tensors, where any look at a value raises."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ON_FAKE_CUDA = """
import dataclasses, os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from benchmarks import fake_cuda
fake_cuda.load(Path({folder!r}))
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from tests.helpers.networks import make_network
from fastdmd.distill.draws import Draws
from fastdmd.distill.gan import GAN
from fastdmd.distill.matching import ScoreIdentity
from fastdmd.distill.methods import Adversarial, Regressed
from fastdmd.distill.regression import AdversarialPairDraws
from fastdmd.distill.turns import DMD2
from fastdmd.networks.discriminator import Discriminator, ImageDiscriminator
from fastdmd.networks.unet import UNetConfig
from fastdmd.ranks import Ranks
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

class NothingFromTheHost(TorchDispatchMode):  # nor to it: a pageable copy would end a capture
    def __init__(self):
        super().__init__()
        self.names = []
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {{}}))
        devices = {{x.device.type for x in tree_leaves((arguments, options, result)) if isinstance(x, torch.Tensor)}}
        assert devices <= {{"cuda"}}, f"{{function}} on {{devices}}"
        self.names.append(str(function))
        return result

def execute(name, run, *optimizers):
    with NothingFromTheHost() as mode:
        run()
    executed.add(name)
    exchanges[name] = [op for op in mode.names if op.startswith("c10d.")]
    assert len(mode.names) > 50 and (name.startswith("generation") or any("backward" in op for op in mode.names)), name

def draws(step, with_everything=False, num_steps=1):
    image, level = lambda: torch.empty(6, 1, 28, 28, device="cuda"), lambda: torch.empty(6, device="cuda")
    labels = torch.empty(6, device="cuda", dtype=torch.int64)
    key = lambda: torch.empty(4, device="cuda", dtype=torch.int64)
    shift = lambda: torch.empty(6, 2, device="cuda", dtype=torch.int64)
    own = dict(noise=image(), class_labels=labels, dm_sigma=level(), dm_key=key(), fake_sigma=level(), fake_key=key())
    if num_steps > 1:
        own |= dict(step_noise=torch.empty(6, num_steps - 1, 1, 28, 28, device="cuda"))
    if not with_everything:
        return Draws(**own)
    return AdversarialPairDraws(**own, gan_sigma=level(), gan_key=key(), real_images=image(), real_labels=labels,
                                real_sigma=level(), real_key=key(), gan_shift=shift(), real_shift=shift(),
                                pair_noise=image(), pair_images=image(), pair_labels=labels)

executed, exchanges = set(), {{}}
network = make_network()
heads = [ImageDiscriminator(network.image_shape, network.num_classes, sigma_data=0.5),
         Discriminator(network.feature_shape)]
with FakeTensorMode():
    gan = GAN(gan_generator_weight=1e-2, gan_guidance_weight=1e-2, gan_r1_weight=1.0, divergence="forward-kl",
              gan_features="fake", gan_max_sigma=80.0, gan_lr=1e-3)
    low = {{"compute_dtype": torch.bfloat16, "accumulation_steps": 2}}
    heads = [fake_cuda.fake(head) for head in heads]
    of_images = dataclasses.replace(gan, divergence="reverse-kl", gan_features="images")
    sid = Adversarial(of_images, heads[0], 0.5, ScoreIdentity(1.2))
    everything = {{"method": Regressed(sid, 0.25), "compute_dtype": torch.bfloat16}}
    for sigmas, options in (
        ((80.0,), {{}}),
        ((80.0,), low),
        ((80.0,), everything),
        ((80.0, 6.0, 0.5), low | {{"method": Adversarial(gan, heads[1], 0.5)}}),
    ):
        source = draws
        if "method" in options:  # and the processes of a group
            if not torch.distributed.is_initialized():
                torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
                Ranks.spread_ = lambda *_: None  # of what has no values
            options["process_group"] = torch.distributed.group.WORLD
            options["head_options"] = dict(learning_rate=1e-3, max_grad_norm=1.0)
            source = lambda step, num_steps=len(sigmas): draws(step, with_everything=True, num_steps=num_steps)
        groups = {{"norm": {{"weight_decay": 0.0}}}} if options else None
        model = DMD2(fake_cuda.fake(network), generator_sigmas=sigmas, sigma_data=0.5, dfake_gen_update_ratio=3,
                     generator_options=dict(learning_rate=1e-3, ema_decay=(0.9, 0.99), max_grad_norm=1, groups=groups),
                     guidance_options=dict(learning_rate=1e-3, max_grad_norm=1.0), **options)
        model.executor.run = execute
        for step in range(5):
            metrics = model.iterate(step, source)
        for wrong in (lambda x: x.copy_(torch.ones(3)), lambda x: torch.ones(3).to(x.device), lambda x: x.cpu()):
            try:
                execute("wrong", lambda: wrong(torch.ones(3, device="cuda")))
            except AssertionError as error:
                assert "'cpu'" in str(error), error
            else:
                raise AssertionError("a copy went unnoticed")
        assert "method" not in options or model.head_optimizer.num_updates == 5 and "gan_r1" in metrics
        assert metrics["loss_fake"].device.type == "cuda" and model.generator.conv_in.weight.grad.device.type == "cuda"
        for sync in (lambda: metrics["loss_fake"].item(), lambda: bool(metrics["fake_grad_norm"] > 1)):
            try:
                sync()
            except DataDependentOutputException:
                continue
            raise AssertionError("a host sync went unnoticed")
assert executed == {{"generator", "guidance", "generation"}}, executed
told = {{name: [op.split(".")[1] for op in ops] for name, ops in exchanges.items()}}
means, gradients = ["allreduce_"] * 2, ["allreduce_"]  # of the parts of a batch, and of an optimizer
assert told == {{"generator": means + gradients, "guidance": 2 * gradients, "generation": []}}, told
print("no sync in", step + 1, "iterations", flush=True)
os._exit(0)  # the engine's thread for the fake device cannot be joined
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to make a fake CUDA device")
@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of torch has registered a CUDA of its own")
def test_turns_never_wait_for_the_host(tmp_path):
    """Whole turns on fake CUDA tensors, where any host sync or data-dependent branch raises; and that it does."""
    code = ON_FAKE_CUDA.format(root=str(Path(__file__).parents[2]), folder=str(tmp_path))
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "no sync in 5 iterations" in result.stdout
