#!/usr/bin/env python3
"""Writes a tiny GGUF model with seeded random weights (half a megabyte): it talks nonsense, but the real engine loads and
runs it, and nothing has to be downloaded. Needs `gguf` from PyPI. Usage: tiny_gguf.py FILE"""
import sys

import gguf
import numpy

LAYERS, WIDTH, HEADS, FEED, CONTEXT = 2, 64, 4, 128, 512
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"


def main(path):
    random = numpy.random.default_rng(4700)
    writer = gguf.GGUFWriter(path, "llama")
    tokens = [b"<unk>", b"<s>", b"</s>"] + [f"<0x{byte:02X}>".encode() for byte in range(256)]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL] + [gguf.TokenType.BYTE] * 256
    # Whole characters too, so that what it says is text.
    for character in "\u2581abcdefghijklmnopqrstuvwxyz.,!?":
        tokens.append(character.encode())
        kinds.append(gguf.TokenType.NORMAL)
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)

    def weights(name, *shape):
        writer.add_tensor(name, (random.standard_normal(shape) * 0.08).astype(numpy.float32))

    def ones(name):
        writer.add_tensor(name, numpy.ones(WIDTH, dtype=numpy.float32))

    weights("token_embd.weight", len(tokens), WIDTH)
    for layer in range(LAYERS):
        ones(f"blk.{layer}.attn_norm.weight")
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            weights(f"blk.{layer}.{part}.weight", WIDTH, WIDTH)
        ones(f"blk.{layer}.ffn_norm.weight")
        weights(f"blk.{layer}.ffn_gate.weight", FEED, WIDTH)
        weights(f"blk.{layer}.ffn_up.weight", FEED, WIDTH)
        weights(f"blk.{layer}.ffn_down.weight", WIDTH, FEED)
    ones("output_norm.weight")
    weights("output.weight", len(tokens), WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(sys.argv[1])
