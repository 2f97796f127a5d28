"""Memory that the allocator of the system keeps and gives back."""

import sys

import pytest
import torch

from qlora.system import memory


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_what_is_freed_while_a_model_is_read_goes_back_to_the_system():
    def anonymous_after_holes():
        torch.ones(2**22)  # 16 MiB: glibc keeps what is smaller in its heap from now on
        blocks = [(torch.ones(2**19), torch.ones(2**14)) for _ in range(64)]  # 2 MiB, and 64 KiB that stay behind each
        return [small for _, small in blocks]

    before = memory.anonymous_bytes()
    with memory.freed_at_once():
        kept = anonymous_after_holes()
    assert memory.anonymous_bytes() - before < 2**25  # 128 MiB were there
    del kept
