"""RECIPE CKPT IDS.npy OUT.npz: the logits of MindFormers' model, float32 [rows, length, vocabulary].

Fails when the CKPT lacks one of the model's parameters.
"""

import sys

import mindspore as ms
import numpy as np
from mindformers_cpu import load_recipe


def main(recipe: str, checkpoint: str, ids: str, out: str) -> None:
    from mindformers.models.build_model import build_network

    config = load_recipe(recipe)
    network = build_network(config.model)
    parameters = ms.load_checkpoint(checkpoint)
    missing, _ = ms.load_param_into_net(network, parameters, strict_load=True)
    if missing:
        sys.exit(f"{checkpoint} lacks {missing}")
    network.set_train(False)
    logits, _, _ = network(ms.Tensor(np.load(ids), ms.int32))
    np.savez(out, logits=logits.asnumpy())


main(*sys.argv[1:])
