"""Name -> frozen base model in NF4 and its tokenizer. The dtype policy is here and nowhere else:

weight of every linear layer but the head   uint8 NF4 codes; per block of 64 an 8-bit absmax (double quantization)
every other parameter                       quantization.compute_dtype (bfloat16 by default)
buffers                                     as the architecture makes them (rotary frequencies are float32)
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from . import files, memory
from .errors import DoesNotFit, InputError
from .rundir import sha256

# W is cast to bfloat16 before it is quantized, whatever the files hold: fp32, fp16 and bf16 copies of one weight give
# different NF4 codes, so the dtype is part of what was trained.
DTYPE_WHEN_QUANTIZED = torch.bfloat16


@dataclass(frozen=True)
class Checkpoint:
    """A model folder on disk whose safetensors headers have been read and found whole.

    files: {tensor name: file name}. revision: the hub commit, or None for a local folder.
    new_tokens: {token: id} of model.new_tokens; added: those ids that the folder's own tokenizer does not have.
    """

    name_or_path: str
    folder: Path
    revision: str | None
    files: dict = field(repr=False)
    new_tokens: dict = field(default_factory=dict)
    added: frozenset = frozenset()

    def file_hashes(self):
        """Return {file name: sha256} of config.json and the weight files."""
        names = sorted(set(self.files.values()))
        return {name: sha256(self.folder / name) for name in ["config.json", *names]}

    def generation_config(self):
        """Return what generation_config.json holds, or None where there is none."""
        from transformers import GenerationConfig

        path = self.folder / "generation_config.json"
        try:
            return GenerationConfig.from_pretrained(self.folder) if path.is_file() else None
        except (ValueError, TypeError, AttributeError, OSError) as error:
            raise InputError(f"{path}: {_said(error)}") from None

    def shapes(self):
        """Return {tensor name: shape} from the headers, without reading weights."""
        shapes = {}
        for name in sorted(set(self.files.values())):
            with safe_open(self.folder / name, "pt") as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        return shapes


def find(section, weights=True):
    """Return the Checkpoint of recipe section `model`: a local folder, or a hub name (downloaded if need be).

    weights: False if config and tokenizer will do: no weights are downloaded or looked at, and `files` is empty.

    Raises:
        InputError: no such folder or repository, no safetensors, an unsafe index, or a corrupt file.
    """
    folder, revision = Path(section.name_or_path), None
    if folder.is_file():
        raise InputError(f"model.name_or_path {folder}: is a file; give the model folder")
    if not folder.is_dir():
        folder, revision = _download(section, weights)
    elif section.revision is not None:
        raise InputError(f"model.revision {section.revision}: {folder} is a local folder, which has no revisions")
    _refuse_folder(folder)
    tensors = weight_files(folder) if weights else {}
    if not section.new_tokens:
        return Checkpoint(section.name_or_path, folder, revision, tensors)
    tokenizer = load_tokenizer(folder, section)
    known = set(tokenizer.get_vocab().values())
    new_tokens = add_tokens(tokenizer, section.new_tokens)
    added = frozenset(new_tokens.values()) - known
    return Checkpoint(section.name_or_path, folder, revision, tensors, new_tokens, added)


# Sizes that every architecture has under one of these names, and what none exceeds: building a model of more would take
# all time and memory before its weights could disagree.
_SIZES = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 1000),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 2**16),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 2**24),
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "n_positions"), 2**28),
}


def _refuse_folder(folder):
    """Raise InputError unless the folder is that of one model, whose small files can be read."""
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        trained_on = files.read_object(adapter).get("base_model_name_or_path")
        what = "there is an adapter in it" if (folder / "config.json").is_file() else "is an adapter, not a model"
        raise InputError(
            f"model.name_or_path {folder}: {what} ({adapter.name}); give the model that it was trained on"
            f"{f' ({trained_on})' if trained_on else ''}; `qlora export {folder} --model MODEL` makes one of both"
        )
    if not (folder / "config.json").is_file():
        raise InputError(f"model.name_or_path {folder}: no config.json; not a model folder")
    config = files.read_object(folder / "config.json")
    problems = _absurd(config)
    if problems:
        raise InputError.listing(folder / "config.json", problems, "mend it or download it again")
    for name, value in config.items():
        if name.endswith("_implementation") and re.search(r"[/\\:@]", str(value)):
            raise InputError(
                f"{folder / 'config.json'}: {name} {value!r} names code on the hub, which transformers would get and run; "
                "take it out of the file (recipes have model.attn_implementation)"
            )
    generation = folder / "generation_config.json"
    if generation.is_file():
        ends = files.read_object(generation).get("eos_token_id")
        listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
        if not all(type(one) is int and one >= 0 for one in listed):
            raise InputError(f"{generation}: eos_token_id {ends!r} is neither a token id nor a list of them")


def _absurd(config):
    """Return in words what is wrong with the sizes in a config, those of the text part of a larger model too."""
    parts = [config, *(part for part in (config.get("text_config"),) if isinstance(part, dict))]
    return [
        f"{name}: {part[name]!r} is not a whole number from 1 to {most:,}"
        for part in parts
        for name, most in _SIZES.items()
        if part.get(name) is not None and not (type(part[name]) is int and 1 <= part[name] <= most)
    ]


def _download(section, weights):
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name = section.name_or_path
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_like_path:
        raise InputError(f"model.name_or_path {name}: no such folder, and not a hub name (OWNER/NAME)")
    try:
        wanted = [
            *(["*.safetensors"] if weights else []),
            "*.json",
            "*.jinja",
            "*.model",
            "*.txt",
            *(["*.py"] if section.trust_remote_code else []),
        ]
        unwanted = ["*/*", "consolidated*"]  # second copies of the weights, in other layouts
        found = snapshot_download(name, revision=section.revision, allow_patterns=wanted, ignore_patterns=unwanted)
        folder = Path(found)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(f"model.name_or_path {name}: no such folder, and the hub says: {_said(error)}") from None
    return folder, folder.name


def weight_files(folder):
    """Return {tensor name: file name} of the safetensors in `folder`; raises InputError unless they are whole."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        names = [single.name]
    elif index.is_file():
        listed = files.read_object(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
            raise InputError(f"{index}: its weight_map is not {{tensor: file name}}; download the model again")
        names = sorted(set(listed.values()))
        # transformers joins these names unchecked: "../x" and absolute paths would be read
        unsafe = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
        if unsafe:
            raise InputError(
                f"{index}: {unsafe[0]!r} is not a plain safetensors file name; the folder cannot be trusted"
            )
    else:
        raise InputError(
            f"{folder}: no model.safetensors and no model.safetensors.index.json (pickled weights are not read; take a "
            "copy or a revision in safetensors)"
        )
    found: dict = {}
    for name in names:
        if not (folder / name).is_file():
            raise InputError(f"{folder / name} is listed in {index.name} but missing; download the model again")
        files.refuse_instead(folder / name)
        try:
            with safe_open(folder / name, "pt") as file:
                keys = file.keys()
        except (SafetensorError, OSError) as error:
            raise InputError(f"{folder / name} is not a whole safetensors file ({error}); download it again") from None
        twice = sorted(found.keys() & set(keys))
        if twice:
            raise InputError(
                f"{folder}: {twice[0]} is both in {found[twice[0]]} and in {name}; download the model again"
            )
        found |= dict.fromkeys(keys, name)
    return found


def load_config(checkpoint, section):
    """Return the transformers config, its vocab_size grown to hold the checkpoint's new tokens.

    Raises:
        InputError: not a known causal language model in 16 or 32 bit; or rows would have to be made up for tokens
            that are not trained.
    """
    config = _read_config(checkpoint, section)
    if checkpoint.new_tokens:
        text_config, ids = config.get_text_config(), set(checkpoint.new_tokens.values())
        needed = set(range(text_config.vocab_size, max(ids) + 1))
        if needed - ids:
            raise InputError(
                f"{checkpoint.folder}: the model has {text_config.vocab_size} embeddings, and its tokenizer has tokens "
                f"beyond them ({_names(checkpoint, section, needed - ids)}); list these in model.new_tokens too"
            )
        text_config.vocab_size += len(needed)
    return config


def _names(checkpoint, section, ids):
    tokens = load_tokenizer(checkpoint.folder, section).convert_ids_to_tokens(sorted(ids)[:5])
    return ", ".join(map(repr, tokens)) + (", ..." if len(ids) > 5 else "")


def _read_config(checkpoint, section):
    from transformers import AutoConfig, AutoModelForCausalLM

    path = checkpoint.folder / "config.json"
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=section.trust_remote_code)
    except Exception as error:  # its class computes with what the file says, and divides by zero heads
        raise InputError(f"{path}: {_said(error)}") from None
    known = type(config) in AutoModelForCausalLM._model_mapping or "AutoModelForCausalLM" in getattr(
        config, "auto_map", {}
    )
    if not known:
        raise InputError(f"{checkpoint.folder / 'config.json'}: {config.model_type!r} is not a causal language model")
    if getattr(config, "quantization_config", None):
        raise InputError(
            f"{checkpoint.folder}: the weights are quantized already; give the 16-bit model it was made from"
        )
    return config


def load_tokenizer(folder, section):
    """Return the tokenizer in `folder`, with a pad token; raises InputError where there is none.

    Pads are masked by position, never by id, so that pad == end token cannot hide the end of a turn.
    """
    from transformers import AutoTokenizer

    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            files.read_object(folder / name)
    for template in sorted(folder.glob("*.jinja")):
        files.refuse_instead(template)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=section.trust_remote_code)
    except Exception as error:  # the Rust library raises Exception itself
        if (folder / "tokenizer.json").is_file():
            files.read_object(folder / "tokenizer.json")
        raise InputError(f"{folder}: no usable tokenizer: {_said(error)}") from None
    for name, kinds in (("chat_template", (str, dict, type(None))), ("model_max_length", (int, float))):
        if not isinstance(getattr(tokenizer, name), kinds):
            raise InputError(f"{folder / 'tokenizer_config.json'}: {name} cannot be {getattr(tokenizer, name)!r}")
    if not tokenizer.is_fast:
        raise InputError(f"{folder}: the tokenizer has no tokenizer.json, so the loss mask cannot be placed")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def add_tokens(tokenizer, tokens, template=None):
    """Return {token: id} of `tokens` (None: no tokens), after adding to `tokenizer` those that are not one token there.

    An added token that stands in the chat template (`template`, or the tokenizer's own) is special, which decoded answers
    leave out; the others they keep.

    Raises:
        InputError: two of them are the same token to this tokenizer.
    """
    from transformers import AddedToken

    template, ids = template or str(tokenizer.chat_template or ""), {}
    for token in tokens or ():
        found = tokenizer(token, add_special_tokens=False).input_ids
        if len(found) != 1 or (found[0] == tokenizer.unk_token_id and token != tokenizer.unk_token):
            special = token in template
            tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)], special_tokens=special)
            found = [tokenizer.convert_tokens_to_ids(token)]
        same = next((other for other, number in ids.items() if number == found[0]), None)
        if same is not None:
            raise InputError(f"model.new_tokens: to this tokenizer {same!r} and {token!r} are one token; keep one")
        ids[token] = found[0]
    return ids


def load(checkpoint, section, quantization, device=None, dtype=DTYPE_WHEN_QUANTIZED):
    """Return the frozen model of `checkpoint` in eval mode: NF4 under `quantization`, or plain `dtype` if it is None.

    It has a row for each of the checkpoint's new tokens; see `add_rows` for where these start.

    Raises:
        DoesNotFit: there is not enough memory.
        InputError: a weight is missing, left over or of another shape than the config says; names them.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    device = torch.device(device or default_device())
    num_rows = load_config(checkpoint, section).get_text_config().vocab_size
    bnb = quantization and BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.use_double_quant,
        bnb_4bit_compute_dtype=dtype_of(quantization.compute_dtype),
    )
    try:
        if device.type != "meta":  # where nothing is read
            _refuse_not_finite(checkpoint, section)
        model, info = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder,
            config=_read_config(checkpoint, section),
            dtype=dtype,
            quantization_config=bnb,
            device_map={"": device},
            attn_implementation=None if section.attn_implementation == "auto" else section.attn_implementation,
            trust_remote_code=section.trust_remote_code,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported like the rest, below; nothing is let through
            output_loading_info=True,
        )
    except InputError:
        raise
    except Exception as error:  # an architecture computes with what its config says, as in on_meta
        if memory.is_refusal(error):
            raise DoesNotFit(
                f"out of memory while {checkpoint.name_or_path} was loaded: {memory.refused(error)}\n  free some, take a "
                f"smaller model{'' if quantization else ', or leave out quantization: null'}"
            ) from None
        raise InputError(f"{checkpoint.folder}: cannot load the model: {_said(error)}") from error
    _refuse_incomplete(checkpoint, info)
    if quantization and quantization.compute_dtype == "float32":
        to_float32(model)
    if quantization and not quantized_modules(model):
        raise InputError(f"{checkpoint.folder}: no linear layer could be quantized; set quantization: null")
    _refuse_rows_that_are_no_blocks(checkpoint, quantized_modules(model))
    for module in quantized_modules(model).values():
        # Without this, one forward in eval mode on an AVX512-BF16 host repacks the weight in place: from then on
        # gradients through the base are None and dequantize_4bit returns garbage (bitsandbytes 0.50.2).
        module.support_avx512bf16_for_cpu = False
    if checkpoint.new_tokens:
        add_rows(model, checkpoint.added, num_rows)
    model.requires_grad_(False)
    # what the files were called by the user, so that an adapter names a model and not a cache folder
    model.name_or_path = model.config._name_or_path = checkpoint.name_or_path
    return model.eval()


@torch.no_grad()
def add_rows(model, added, num_rows):
    """Grow embedding and head to `num_rows`; set these rows and the spare ones of `added` ids to the mean of all before.

    A new token then starts out about as likely as the average one, where a random or an unused row would be anywhere:
    https://nlp.stanford.edu/~johnhew/vocab-expansion.html. The mean is taken in float32 and has no random part.
    """
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    means = [layer.weight.mean(0, dtype=torch.float32) for layer in layers]
    num_before = layers[0].weight.shape[0]
    if num_rows > num_before:
        model.resize_token_embeddings(num_rows, mean_resizing=False)
    ids = sorted(added.union(range(num_before, num_rows)))
    for layer, mean in zip([model.get_input_embeddings(), model.get_output_embeddings()], means, strict=True):
        layer.weight[ids] = mean.to(layer.weight.dtype)


def _refuse_not_finite(checkpoint, section):
    """Raise InputError if a weight in the files holds NaN or infinity; names the tensors.

    In the files, not in the model: the codes of a 4-bit weight cannot say so any more. What the architecture leaves in
    the files may be anything: GPT-NeoX's masked_bias of -1e9 is -inf in float16.
    """
    wrong = {}
    for name in sorted(set(checkpoint.files.values())):
        with safe_open(checkpoint.folder / name, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(key)  # mapped: what is read here is in memory when the model is loaded
                if tensor.is_floating_point() and tensor.numel() and not _is_finite(tensor):
                    wrong[key] = f"{key}: holds numbers that are not finite ({name})"
    unused = _left_in_the_files(checkpoint, section, wrong) if wrong else set()
    problems = [problem for key, problem in wrong.items() if key not in unused]
    if problems:
        raise InputError.listing(
            f"{checkpoint.folder}: the weights are broken; the model", problems, "download it again"
        )


def _left_in_the_files(checkpoint, section, keys):
    """Return those of `keys`, names in the files, that the architecture knows and does not read."""
    model = on_meta(_read_config(checkpoint, section), section.trust_remote_code)
    patterns = model._keys_to_ignore_on_load_unexpected or ()
    prefix, read = f"{model.base_model_prefix}.", model.state_dict().keys()
    return {
        key
        for key in keys
        if any(re.search(pattern, key) for pattern in patterns)
        and not read & {key, key.removeprefix(prefix), prefix + key}
    }


def _is_finite(tensor):
    tensor = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    # one reduction: 14 GB/s a core, where isfinite().all() has 0.25; both ends are NaN if one number is
    return all(math.isfinite(end.item()) for end in torch.aminmax(tensor))


def _refuse_incomplete(checkpoint, info):
    problems = [f"missing: {key} (it would be filled with random numbers)" for key in sorted(info["missing_keys"])]
    problems += [f"not used by this architecture: {key}" for key in sorted(info["unexpected_keys"])]
    problems += [
        f"wrong shape: {key} is {tuple(found)} in the files, {tuple(expected)} by config.json"
        for key, found, expected in sorted(info["mismatched_keys"])
    ]
    if problems:
        raise InputError.listing(f"{checkpoint.folder}: config.json and the weights do not fit; the model", problems)


def _refuse_rows_that_are_no_blocks(checkpoint, modules):
    """Raise InputError where bitsandbytes would compute with wrong weights.

    It quantizes in blocks of 64 numbers that run on from row to row; on a CPU, 0.50.2 dequantizes as if each row began
    a block. For rows of 96 numbers the result is 63 % off, where 4 bits cost 9 %, and nothing is said.
    """
    wrong = [
        f"{name}: {module.in_features} inputs"
        for name, module in modules.items()
        if module.weight.device.type == "cpu" and module.in_features % module.weight.blocksize
    ]
    if wrong:
        raise InputError.listing(
            f"{checkpoint.folder}: on a CPU, 4-bit layers need inputs in multiples of 64; the model",
            wrong,
            "set quantization: null, or use a GPU",
        )


def dtype_of(name):
    """Return the torch dtype that a recipe calls "float16", "bfloat16" or "float32"."""
    return getattr(torch, name)


def default_device():
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def quantized_modules(model):
    """Return {name: module} of the 4-bit linear layers of a plain or PEFT model."""
    from bitsandbytes.nn import Linear4bit

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def digest(codes):
    """Return the sha256 of the codes of a 4-bit weight.

    They depend on nothing but the weight. The constants of double quantization do on the order in which a mean is summed,
    so on the number of threads.
    """
    return hashlib.sha256(codes.cpu().contiguous().numpy()).hexdigest()


def digests(model):
    """Return {name: digest} of the 4-bit linear layers of a plain model."""
    return {name: digest(module.weight.data) for name, module in quantized_modules(model).items()}


def is_conv1d(module):
    """True for GPT-2's linear layers, which store their weight as (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def linear_names(model):
    """Return the names of the linear layers that can carry an adapter: all but the head."""
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, torch.nn.Linear) or is_conv1d(module)) and module is not head
    ]


def names_to_quantize(config, section):
    """Return the names of the layers that `load` quantizes of a model with this config."""
    return linear_names(on_meta(config, section.trust_remote_code))


def on_meta(config, trust_remote_code=False):
    """Return the model of a transformers config, with shapes and without numbers.

    Raises:
        InputError: no model can be built of these sizes.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    except (
        Exception
    ) as error:  # an architecture computes with what its config says: sizes below zero, names of functions
        raise InputError(
            f"{Path(config.name_or_path) / 'config.json'}: no model can be built of it: {_said(error)}"
        ) from error


def load_on_meta(config, section, quantization, dtype=DTYPE_WHEN_QUANTIZED):
    """Return the model that `load` returns for this config, its 4-bit layers too, with shapes and without numbers.

    config: the transformers config, grown to the new tokens, see `load_config`.
    """
    from bitsandbytes.nn import Linear4bit

    model = on_meta(config, section.trust_remote_code)
    float32 = quantization and quantization.compute_dtype == "float32"
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if float32 else dtype)
    if quantization:
        for name in linear_names(model):
            old = model.get_submodule(name)
            num_in, num_out = old.weight.shape if is_conv1d(old) else reversed(old.weight.shape)
            bias, compute_dtype = old.bias is not None, dtype_of(quantization.compute_dtype)
            new = Linear4bit(num_in, num_out, bias, compute_dtype, quant_type=quantization.quant_type, device="meta")
            new.bias = old.bias
            new.weight = _weight_on_meta(num_in, num_out, quantization, torch.float32 if float32 else dtype)
            new.support_avx512bf16_for_cpu = False
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, new)
        model.is_loaded_in_4bit = True  # what PEFT chooses its layers by
    if section.attn_implementation != "auto":
        model.set_attn_implementation(section.attn_implementation)
    model.requires_grad_(False)
    return model.eval()


def _weight_on_meta(num_in, num_out, quantization, dtype):
    """Return the Params4bit (num_out, num_in): codes, and the constants that double quantization has of them."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit

    def on_meta(count, dtype=torch.float32):
        return torch.empty(count, dtype=dtype, device="meta")

    count = num_in * num_out
    num_blocks = -(-count // 64)
    shared = {"shape": torch.Size((num_out, num_in)), "blocksize": 64, "quant_type": quantization.quant_type}
    if quantization.use_double_quant:
        nested = QuantState(on_meta(-(-num_blocks // 256)), code=on_meta(256), blocksize=256, dtype=torch.float32)
        shared |= {"offset": on_meta(()), "state2": nested}
    absmax = on_meta(num_blocks, torch.uint8 if quantization.use_double_quant else torch.float32)
    state = QuantState(absmax, code=on_meta(16), dtype=dtype, **shared)
    codes = on_meta((-(-count // 2), 1), torch.uint8)
    weight = Params4bit(codes, False, state, quant_type=quantization.quant_type, bnb_quantized=True)
    weight.__deepcopy__ = lambda memo: weight  # bitsandbytes 0.50.2 can copy only to a CPU; PEFT's DoRA makes a copy
    return weight


def tensors(model):
    """Return all tensors that a plain or PEFT model holds: parameters, buffers, and the constants of 4-bit weights."""
    states = [module.weight.quant_state for module in quantized_modules(model).values()]
    states += [state.state2 for state in states if state.nested]
    constants = [tensor for state in states for tensor in (state.absmax, state.code, getattr(state, "offset", None))]
    return [t for t in (*model.parameters(), *model.buffers(), *constants) if t is not None]


def decoder_layers(model):
    """Return the list of decoder layers of a plain or PEFT model: of its module lists the one with most parameters."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=lambda layers: sum(parameter.numel() for parameter in layers.parameters()))


def token_modules(model):
    """Return the names of the modules that have a row a token: the embedding, and the head if it is not tied to that.

    Raises:
        InputError: PEFT cannot train single rows of them.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or not isinstance(embedding, torch.nn.Embedding):
        raise InputError(
            f"model.new_tokens: {type(model).__name__} has no plain embedding and head whose rows could be trained"
        )
    if head.bias is not None:  # TrainableTokensLayer computes F.linear(x, W): peft 0.21
        raise InputError(
            f"model.new_tokens: the head of {type(model).__name__} has a bias, which PEFT loses where it trains rows; "
            "leave model.new_tokens out, or take another model"
        )
    names = {module: name for name, module in model.named_modules()}
    return [names[embedding], *([] if head.weight is embedding.weight else [names[head]])]


def to_float32(model):
    """Compute in float32 from now on, in place: exact NF4 values (not rounded to bfloat16), all else upcast.

    dequantize_4bit rounds to `quant_state.dtype`, the dtype W had; in float32 the KL of a faithful merge is 3e-6
    instead of 2e-4 (measured, SmolLM2-135M).
    """
    # transformers refuses its own .float() on a quantized model; codes are uint8 and stay
    model._apply(lambda tensor: _upcast(tensor) if tensor.is_floating_point() else tensor)
    for module in quantized_modules(model).values():
        module.compute_dtype = torch.float32
        module.weight.quant_state.dtype = torch.float32
    return model


def stand_in(shape, dtype, device):
    """Return a tensor that has shape, dtype and device of a weight, takes no memory and survives to_float32 so."""
    return torch.zeros(1, dtype=dtype, device=device).as_strided(shape, [0] * len(shape))


def replace_by_stand_ins(model):
    """Put a stand-in on the CPU in the place of every parameter of a model on the meta device."""
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                made = stand_in(parameter.shape, parameter.dtype, "cpu")
                module._parameters[leaf] = torch.nn.Parameter(made, requires_grad=False)


def is_stand_in(tensor):
    return tensor.dim() > 0 and not any(tensor.stride())


def _upcast(tensor):
    if is_stand_in(tensor):
        return tensor[(0,) * tensor.dim()].float().as_strided(tensor.shape, tensor.stride())
    return tensor.float()


def num_parameters(model):
    """Return (trainable, total) counts; a 4-bit weight counts as the numbers it stands for, a tied one once."""
    trainable = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        count = state.shape.numel() if state is not None else parameter.numel()
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total


def _said(error):
    """Return what a library says of a file in a model folder, in one line."""
    text = str(error).strip()
    if "trust_remote_code" in text:
        return (
            "it needs code that comes with the model, which is not run; if you have read that code and trust it, set "
            "model.trust_remote_code=true"
        )
    lines = [line.strip() for line in text.splitlines()]
    if not lines or isinstance(error, (KeyError, AttributeError, ZeroDivisionError, RecursionError)):
        return f"it does not say what it has to ({type(error).__name__}: {text})"
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
