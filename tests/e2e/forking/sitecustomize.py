"""Lets a vLLM server of the tests fork its engine and its workers.

On a CPU vLLM spawns them: each imports everything once more, and a start takes twice as long. Servers that `trl-atropos launch`
starts in tests spawn as always.
"""

import multiprocessing


_get_context = multiprocessing.get_context


def get_context(method=None):
    return _get_context("fork" if method == "spawn" else method)


multiprocessing.get_context = get_context
