"""Parity with the official code: networks filled from their shapes alone return golden/parity.npz.

The golden outputs, the rule by which parameters are filled and the bounds: fill.py, and the reference's own float32
error beside each output. About 10 seconds on 2 cores.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fill import coarse, converge_spectral_norm_, difference, fill_, inputs, top_singular_vectors, values

import bigbigan

GOLDEN = np.load(Path(__file__).parent / "golden" / "parity.npz")
FLOAT32_ERROR = json.loads(str(GOLDEN["float32_error"]))


def agree(key, x):
    bound, found = max(1e-5, 4 * FLOAT32_ERROR[key]), difference(GOLDEN, key, x)
    print(f"{key}: largest difference {found:.1e} of the root mean square, bound {bound:.1e}")
    assert found <= bound, f"{key} differs by {found:.2e} of its root mean square, more than {bound:.1e}"


def filled(network):
    return converge_spectral_norm_(fill_(network)).eval().to(memory_format=torch.channels_last)


def test_the_rule_gives_the_documented_numbers():
    assert np.allclose(values((2, 3))[0], [-0.785008, -0.814566, 0.284518], atol=1e-6)
    assert np.allclose(inputs(1, (2, 2))[0], [[0.932322, -0.134842], [-1.097771, 1.209314]], atol=1e-6)


GENERATORS = {  # case: G, whether labels condition it as they are, z's width
    "1": (lambda: bigbigan.Generator((256, 256, 128, 64, 32, 16), 120, 128, 10, attention=64, eps=1e-6), False, 120),
    "3a": (lambda: bigbigan.Generator((256,) * 4, 128, 0, 10, eps=1e-8), True, 128),
}
PARAMETERS = {"1": 2_331_428, "2": 2_406_130, "3a": 4_304_387, "3b": 4_207_361}


@torch.no_grad()
@pytest.mark.parametrize("case", GENERATORS)
def test_biggan_generator(case):
    make, direct, width = GENERATORS[case]
    G, before = filled(make()), []
    assert sum(p.numel() for p in G.parameters()) == PARAMETERS[case]
    G.last.register_forward_hook(lambda module, args, out: before.append(out))
    (z,), (many,) = (inputs(int(case[0]), (n, width)) for n in (2, 8))
    few, all_labels = torch.tensor([3, 7]), torch.arange(8)
    condition = (lambda labels: labels) if direct else G.embed
    agree(f"{case}.out", G(z, condition(few)))
    agree(f"{case}.before_tanh", before[0])
    bigbigan.power_iteration(G.train())  # from the exact singular vectors it changes nothing
    agree(f"{case}.train", G(many, condition(all_labels)))


DISCRIMINATORS = {  # case: F, size
    "2": (lambda: bigbigan.image_trunk((16, 32, 64, 128, 256, 256), 5, 128, attention=64, eps=1e-6), 128),
    "3b": (lambda: bigbigan.image_trunk((256,) * 4, 2, 32, eps=1e-8), 32),
}


@torch.no_grad()
@pytest.mark.parametrize("case", DISCRIMINATORS)
def test_biggan_discriminator(case):
    """F and s_x; the class projection, which an unconditional D lacks, is added from the same rule."""
    make, size = DISCRIMINATORS[case]
    D = filled(bigbigan.Discriminator(make(), 256, z_dim=4, width=8, blocks=1))
    embedding, pooled = values((10, 256)), []
    D.s_x.register_forward_pre_hook(lambda module, inputs: pooled.append(inputs[0]))
    parameters = sum(p.numel() for part in (D.F, D.s_x) for p in part.parameters())
    assert parameters + embedding.numel() == PARAMETERS[case]
    u, v = top_singular_vectors(embedding)
    rows = (embedding / (u @ embedding.double() @ v).float())[[3, 7]]
    number = int(case[0])
    for x, prefix in ((inputs(number, (2, 3, size, size))[0], ""), (coarse(number, (2, 3, size, size)), "blocky_")):
        s_x, _, _ = D(x, torch.zeros(2, 4))
        agree(f"{case}.{prefix}pooled", pooled[-1])
        agree(f"{case}.{prefix.strip('_') or 'out'}", s_x[:, None] + (rows * pooled[-1]).sum(1, keepdim=True))
