"""The losses of examples/plain_loop.py under torch.compile, without a graph break, and with the same numbers.

`python -m examples.compiled_loop` compiles both for a while, networks and ops in one graph each.
"""

import torch

from examples import plain_loop
from examples.toy import pretrained


def main(iterations: int = 20, backend: str = "inductor") -> None:
    torch.manual_seed(0)
    network = pretrained(100)
    compiled = {
        name: torch.compile(getattr(plain_loop, name), fullgraph=True, backend=backend)
        for name in ("generator_loss", "fake_score_loss")
    }
    (_, eager), (_, losses) = plain_loop.distil(network, iterations), plain_loop.distil(network, iterations, **compiled)
    print(f"loss of the fake score after {iterations} iterations: {losses[-1]:.4f}; eager {eager[-1]:.4f}")
    # Noise is made inside of the graphs, from a state that they move on: the draws are those of the eager loop.
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(eager), rtol=1e-3, atol=0)


if __name__ == "__main__":
    main()
