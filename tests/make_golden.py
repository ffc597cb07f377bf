"""Make tests/golden/*.safetensors: weights, ids and logits of tiny random GPT-NeoX models.

    pip install transformers && python tests/make_golden.py

With them test_model.py checks our model against transformers where that is not installed.
"""
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

CASES = {"parallel": dict(use_parallel_residual=True, partial=0.25),
         "sequential": dict(use_parallel_residual=False, partial=1.0)}

for name, case in CASES.items():
    torch.manual_seed(0)
    config = dict(vocab_size=96, hidden_size=32, intermediate_size=128, num_hidden_layers=2,
                  num_attention_heads=4, max_position_embeddings=64,
                  use_parallel_residual=case["use_parallel_residual"])
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": case["partial"]}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**config, rope_parameters=rope)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1 if p.dim() == 1 else 0, 0.3 if p.dim() == 2 else 0.1)
    ids = torch.randint(0, 96, (3, 40))
    with torch.no_grad():
        logits = model(ids).logits
    # In memory transformers >= 5 calls the unembedding lm_head, in its files embed_out
    weights = {}
    for key, value in model.state_dict().items():
        weights[key.replace("lm_head", "embed_out")] = value.contiguous()
    tensors = {**weights, "ids": ids, "logits": logits}
    save_file(tensors, Path(__file__).parent / "golden" / f"{name}.safetensors",
              metadata={"config": json.dumps({**config, "rotary_pct": case["partial"]})})
