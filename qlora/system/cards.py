"""The cards that a plan knows: how fast they compute and read, and how much they hold. Another card is a line here."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import InputError

GiB = 2**30


@dataclass(frozen=True)
class Card:
    """gib: what a process sees of its memory, which is less than what is on the box. flops: dense products in bfloat16, or in
    float16 where that is not computed, with sums in float32, a second. bandwidth: bytes a second. bfloat16: whether it
    computes in it. size: GB on the box. link: of LINKS, by which two of them in one machine reach each other."""

    name: str
    size: int
    gib: float
    flops: float
    bandwidth: float
    bfloat16: bool = True
    link: str = "PCIe 4.0 x8"

    @property
    def link_bandwidth(self):
        """Bytes a second that a card sends, and receives at the same time."""
        return LINKS[self.link]

    @property
    def host_bandwidth(self):
        """Bytes a second that a card gets from CPU memory."""
        return LINKS[_TO_HOST.get(self.link, self.link)]

    @property
    def memory(self):
        """Bytes that a process sees."""
        return int(self.gib * GiB)


# Bytes a second in one direction: signalled (PCI-SIG: 8, 16 and 32 GT/s a lane, 128b/130b; NVIDIA's data sheets of V100, A100 and
# H100: half of the 300, 600 and 900 GB/s of both directions), less a fifth for headers and protocol: assumed, not measured.
# GeForce cards: eight lanes, because boards with two slots split the sixteen of the CPU.
LINKS = {
    "PCIe 3.0 x8": 0.8 * 7.88e9,
    "PCIe 3.0 x16": 0.8 * 15.75e9,
    "PCIe 4.0 x8": 0.8 * 15.75e9,
    "PCIe 4.0 x16": 0.8 * 31.5e9,
    "PCIe 5.0 x8": 0.8 * 31.5e9,
    "PCIe 5.0 x16": 0.8 * 63e9,
    "NVLink 2": 0.8 * 150e9,
    "NVLink 3": 0.8 * 300e9,
    "NVLink 4": 0.8 * 450e9,
}
_TO_HOST = {"NVLink 2": "PCIe 3.0 x16", "NVLink 3": "PCIe 4.0 x16", "NVLink 4": "PCIe 5.0 x16"}  # the same sheets

# FLOPS and bandwidth are of the makers' sheets, without sparsity and with sums in float32, which is what torch computes. On
# GeForce cards since 30xx that is half of the headline, and twice the FP32 of the sheet: [C] is computed so (59.5 = 2 x 29.8 for
# the 3080, 165.2 = 2 x 82.6 for the 4090 are in NVIDIA's own tables).
# Compared on 2026-11-26 with public copies and tables of the sheets, equal: T4, 3060, 4070 Ti Super, 4080, 4080 Super, 4090,
# 5080, L4, L40S, A100, H100, H200; the bandwidth of A10G, V100 and 5090. No copy was found, but they follow from others: FLOPS of
# the 2080 Ti (2 x 26.9 of FP16), 3090 (2 x 35.6) and A6000 (4 x 38.7, as of the A40). Not checked: FLOPS of A10G,
# V100, H100 PCIe, 5070 Ti and 5090, all of the 4060 Ti, bandwidth of 2080 Ti, 3090, 5070 Ti and A6000, and cards not named here.
# GiB are those of torch's messages, "GPU 0 has a total capacity of 23.64 GiB", in public reports: owner/name#number. [S]: no
# report names the card; what another of the same size and generation has.
CARDS = (
    Card(
        "RTX 2080 Ti", 11, 10.76, 53.8e12, 616e9, False, link="PCIe 3.0 x8"
    ),  # NVIDIA Turing whitepaper; JDAI-CV/image-captioning#11
    Card("RTX 3060 12GB", 12, 11.75, 25.5e12, 360e9),  # [C]; TencentARC/PhotoMaker#47, Kunhao-Liu/StyleGaussian#12
    Card("RTX 3070", 8, 7.78, 40.6e12, 448e9),  # [C]; akshitac8/OW-DETR#46, meta-llama/codellama#82
    Card("RTX 3080 10GB", 10, 9.78, 59.5e12, 760e9),  # NVIDIA GA102 whitepaper; zai-org/CogVideo#34
    Card("RTX 3080 12GB", 12, 11.75, 61.3e12, 912e9),  # [C]; [S] 3060
    Card(
        "RTX 3090", 24, 23.68, 71e12, 936e9
    ),  # NVIDIA GA102 whitepaper, table 9; 3DTopia/OpenLRM#42, GaoLii/DSP#10 (23.70)
    Card("RTX 3090 Ti", 24, 23.68, 80e12, 1008e9),  # [C]; [S] 3090
    Card("RTX 4060", 8, 7.75, 30.2e12, 272e9),  # [C]; ESRSchao/EdgeRegNet#2
    Card("RTX 4060 Ti 16GB", 16, 15.6, 44.1e12, 288e9),  # [C]; [S] RTX A4000, DengKaiCQ/VGGT-Long#6 (15.61)
    Card("RTX 4070", 12, 11.6, 58.3e12, 504e9),  # [C]; [S], less than the 4070 Ti's 11.73
    Card("RTX 4070 Super", 12, 11.6, 71.0e12, 504e9),  # [C]; [S]
    Card("RTX 4070 Ti", 12, 11.73, 80.2e12, 504e9),  # [C]; OpenLMLab/LOMO#17
    Card("RTX 4070 Ti Super", 16, 15.6, 88.2e12, 672e9),  # [C]; [S] 4060 Ti
    Card("RTX 4080", 16, 15.6, 97.5e12, 717e9),  # NVIDIA Ada whitepaper, appendix A; [S] 4060 Ti
    Card("RTX 4080 Super", 16, 15.6, 104.4e12, 736e9),  # [C]; [S] 4060 Ti
    # NVIDIA Ada whitepaper, appendix A; pinokiofactory/flux-webui#11 (23.61), ali-vilab/VGen#104 (23.64); newer drivers keep
    # more: 23.5 is on the safe side (XChenZ/havatar#6 has 23.50 of a 24 GB card)
    Card("RTX 4090", 24, 23.5, 165.2e12, 1008e9),
    Card("RTX 5060 Ti 16GB", 16, 15.47, 47.4e12, 448e9, link="PCIe 5.0 x8"),  # [C]; [S] 5080
    Card(
        "RTX 5070", 12, 11.49, 61.7e12, 672e9, link="PCIe 5.0 x8"
    ),  # [C]; shkhln/libc6-shim#14: 12,227 MiB, of which the driver keeps 464
    Card("RTX 5070 Ti", 16, 15.47, 87.9e12, 896e9, link="PCIe 5.0 x8"),  # [C]; [S] 5080
    Card(
        "RTX 5080", 16, 15.47, 112.6e12, 960e9, link="PCIe 5.0 x8"
    ),  # [C]; [C] 16,303 MiB less the 464 that the driver of the 5070 keeps
    # NVIDIA RTX Blackwell whitepaper, appendix A; TrajectoryCrafter/TrajectoryCrafter#20, Wan-Video/Wan2.1#465 (31.37)
    Card("RTX 5090", 32, 31.36, 209.5e12, 1792e9, link="PCIe 5.0 x8"),
    Card(
        "T4", 16, 14.56, 65e12, 320e9, False, link="PCIe 3.0 x16"
    ),  # NVIDIA T4 data sheet; Zheng-Chong/CatVTON#133 (older drivers: 14.75)
    Card(
        "V100 16GB", 16, 15.74, 125e12, 900e9, False, link="NVLink 2"
    ),  # NVIDIA V100 data sheet, SXM2; [C] 16 less the 0.26 that 32 GB lack
    Card("V100 32GB", 32, 31.74, 125e12, 900e9, False, link="NVLink 2"),  # the same; liucongg/ChatGLM-Finetuning#73
    Card(
        "L4", 24, 22.03, 121e12, 300e9
    ),  # NVIDIA L4 data sheet, half of "with sparsity"; torch's messages on Google Cloud's g2
    Card(
        "A10G", 24, 22.0, 70e12, 600e9, link="PCIe 4.0 x16"
    ),  # NVIDIA A10G data sheet (AWS G5); [S] L4: 24 GB less the bits of ECC
    Card(
        "RTX A6000", 48, 47.5, 154.8e12, 768e9, link="PCIe 4.0 x16"
    ),  # NVIDIA RTX A6000 data sheet, half of "with sparsity"; torch: 47.53
    Card(
        "L40S", 48, 44.4, 362e12, 864e9, link="PCIe 4.0 x16"
    ),  # NVIDIA L40S data sheet; stepfun-ai/Step-Video-T2V#8 (44.42)
    Card(
        "RX 7900 XTX", 24, 23.98, 122.8e12, 960e9
    ),  # AMD's page of the card, half precision; torch's "HIP out of memory"
    Card("A100 40GB", 40, 39.5, 312e12, 1555e9, link="NVLink 3"),  # NVIDIA A100 data sheet; TianheWu/CoSeR#10
    Card(
        "A100 80GB", 80, 79.14, 312e12, 2039e9, link="NVLink 3"
    ),  # the same, SXM; lianqi1008/Control-GIC#6, levihsu/OOTDiffusion#235 (79.25)
    Card("H100", 80, 79.11, 989.4e12, 3350e9, link="NVLink 4"),  # NVIDIA H100 data sheet, SXM; vllm-project/vllm#27508
    Card("H100 PCIe", 80, 79.11, 756e12, 2000e9, link="PCIe 5.0 x16"),  # the same; [S] H100
    Card(
        "H200", 141, 139.72, 989.4e12, 4800e9, link="NVLink 4"
    ),  # NVIDIA H200 data sheet, SXM; 139.72 to 139.81 in torch's messages
)

_SIZE = re.compile(r"(?<!\d)(\d+)\s*gi?b(?![a-z])")
_NOISE = re.compile(r"nvidia|geforce|tesla|amd|radeon|graphics|rtx|rx|gpu|sxm\d*|hbm\d*e?|[^a-z0-9]")


def card_of(name) -> Card:
    """Return the Card that `name` means, in any spelling: "4090", "rtx4060ti", "NVIDIA A100-SXM4-80GB"; raises InputError."""
    found = _called(name)
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"--card {name!r}: which of them: {' or '.join(card.name for card in found)}?")
    known = ", ".join(card.name for card in CARDS)
    raise InputError(
        f"--card {name!r}: unknown card; known are {known}\n  for another give its memory: qlora plan --vram 8GiB, qlora init "
        "--card 8GiB; qlora plan --card list says more of these"
    )


def find(name, num_bytes=None):
    """Return the Card that a driver's name means, None if it is none of these: half a name is not guessed at, and no laptop's.

    num_bytes: the memory that torch sees, by which cards of one name are told apart: a 4060 Ti of 8 GB is none of these.
    """
    found = _called(name)
    if num_bytes is not None:
        found = [card for card in found if abs(num_bytes / card.memory - 1) < 0.1]
    return min(found, key=lambda card: card.size, default=None)


def _called(name):
    """Return the Cards with this name, by size if it says one."""
    lower = str(name).lower()
    sizes = {int(size) for size in _SIZE.findall(lower)}
    wanted = _words(lower)
    found = [card for card in CARDS if _words(card.name.lower()) == wanted]
    if not found and wanted.endswith(
        "pcie"
    ):  # slower versions of H100 are cards of their own; of others they compute as fast
        found = [card for card in CARDS if _words(card.name.lower()) == wanted.removesuffix("pcie")]
    return [card for card in found if not sizes or sizes == {card.size}]


def _words(lower):
    return _NOISE.sub("", _SIZE.sub("", lower))


def short(card):
    """Return the name of a Card as one types it: without spaces, as in 3060-12gb."""
    return card.name.lower().removeprefix("rtx ").replace(" ", "-")


def listing():
    """Return [{"name", "memory_bytes", "flops", "bandwidth", "bfloat16", "link"}] of all cards."""
    return [
        {"name": card.name, "memory_bytes": card.memory, "flops": card.flops, "bandwidth": card.bandwidth,
         "bfloat16": card.bfloat16, "link": card.link} for card in CARDS
    ]  # fmt: skip
