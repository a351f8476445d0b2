"""A plugin whose method has the name of another plugin's."""

from dataclasses import dataclass

import numpy as np

from tdabench.api import RepresentationMethod, hookimpl


@dataclass(frozen=True, kw_only=True)
class SharedWords(RepresentationMethod):
    name = "shared-words"
    summary = "not what you think it is"

    def encode(self, context, examples, role):
        return np.ones((len(examples), 1), dtype=np.float32)


@hookimpl
def tdabench_methods():
    return [SharedWords]
