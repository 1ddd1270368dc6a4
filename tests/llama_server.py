"""llama.cpp's own server for a Llama-type model: a service that this project did not write.

Run by an interpreter that has `xllamacpp` (llama.cpp built for Python) and `gguf`, which need not be the one that runs
the tests: ``FEDPT_LLAMA_PYTHON`` names it. ``export`` writes what the script turns into a GGUF file.
"""

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np


def interpreter() -> str | None:
    """One that has both packages, or None."""
    python = os.environ.get("FEDPT_LLAMA_PYTHON", sys.executable)
    found = subprocess.run([python, "-c", "import gguf, xllamacpp"], capture_output=True, check=False)
    return python if found.returncode == 0 else None


def export(model, tokenizer, folder: Path) -> None:
    """Write a model of transformers and its byte-level BPE tokenizer as arrays and JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.detach().float().numpy() for name, weight in model.named_parameters()}
    np.savez(folder / "weights.npz", **weights)
    config = model.config
    described = {
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "heads": config.num_attention_heads,
        "key_heads": config.num_key_value_heads,
        "context": config.max_position_embeddings,
        "epsilon": config.rms_norm_eps,
        "theta": config.rope_parameters["rope_theta"],
        "tokens": [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])],
        "merges": json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"],
        "special": tokenizer.all_special_ids,
        "eos": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
    }
    (folder / "model.json").write_text(json.dumps(described))


@contextmanager
def llama_server(python: str, folder: Path):
    """The server's address, until the end of the block."""
    process = subprocess.Popen(
        [python, __file__, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        address = ""
        for line in process.stdout:
            if line.startswith("http://"):
                address = line.strip()
                break
        assert address, "llama.cpp's server did not start"
        yield address
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdin.close()
        process.stdout.close()


def _write_gguf(folder: Path) -> Path:
    import gguf

    about = json.loads((folder / "model.json").read_text())
    weights = np.load(folder / "weights.npz")
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(about["context"])
    writer.add_embedding_length(about["hidden"])
    writer.add_block_count(about["layers"])
    writer.add_feed_forward_length(about["intermediate"])
    writer.add_head_count(about["heads"])
    writer.add_head_count_kv(about["key_heads"])
    writer.add_layer_norm_rms_eps(about["epsilon"])
    writer.add_rope_freq_base(about["theta"])
    writer.add_rope_dimension_count(about["hidden"] // about["heads"])
    writer.add_vocab_size(len(about["tokens"]))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(about["tokens"])
    kinds = gguf.TokenType
    writer.add_token_types(
        [kinds.CONTROL if number in about["special"] else kinds.NORMAL for number in range(len(about["tokens"]))]
    )
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in about["merges"]])
    writer.add_bos_token_id(about["eos"])
    writer.add_eos_token_id(about["eos"])
    writer.add_pad_token_id(about["pad"])
    writer.add_add_bos_token(False)

    def halves_apart(weight, heads):
        """Rotary pairs as llama.cpp has them: next to each other, and not half a head apart."""
        rows, columns = weight.shape
        return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)

    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    if "lm_head.weight" in weights:
        writer.add_tensor("output.weight", weights["lm_head.weight"])
    names = {
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for number in range(about["layers"]):
        for ours, theirs, heads in (("q_proj", "attn_q", about["heads"]), ("k_proj", "attn_k", about["key_heads"])):
            weight = weights[f"model.layers.{number}.self_attn.{ours}.weight"]
            writer.add_tensor(f"blk.{number}.{theirs}.weight", np.ascontiguousarray(halves_apart(weight, heads)))
        for ours, theirs in names.items():
            writer.add_tensor(f"blk.{number}.{theirs}.weight", weights[f"model.layers.{number}.{ours}.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _serve(folder: Path) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(_write_gguf(folder))
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.n_ctx, params.n_parallel = 2048, 4
    params.warmup = False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    sys.stdout.write(f"{server.listening_address}\n")
    sys.stdout.flush()
    while True:
        time.sleep(1)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
