"""Decoding that is guided by one user's reward: a ``LogitsProcessor``.

Of the k most probable next tokens each one is appended to the text so far, the text is
scored by an exported model with K outputs, and the log-probability gets

    log p(token) + strength · Σ_k p_k s_k(text + token).

The language model and the reward model must share their tokenizer.

    processor = RewardGuide(rewards, weights, strength=2.0, pad=tokenizer.pad_token_id)
    model.generate(**inputs, logits_processor=LogitsProcessorList([processor]))

References:
    Khanov et al., ARGS: Alignment as Reward-Guided Search, 2024
    (https://arxiv.org/abs/2402.01694).
"""

import torch
from transformers import LogitsProcessor


class RewardGuide(LogitsProcessor):
    """Adds a user's reward to the log-probabilities of the most probable tokens."""

    def __init__(self, rewards, weights, *, strength=1.0, num_tokens=10, pad=0):
        """Keeps the reward model.

        Args:
            rewards: a sequence classification model with K outputs.
            weights: float[K] of the user, or float[B, K], one row per text.
            strength: what a unit of reward counts, in nats.
            num_tokens: how many tokens are looked at; all others are excluded.
            pad: id of the padding token.
        """
        self.rewards, self.strength, self.pad = rewards.eval(), strength, pad
        self.weights = torch.as_tensor(weights, dtype=torch.float32)
        self.num_tokens = num_tokens

    @torch.inference_mode()
    def __call__(self, input_ids, scores):
        """float[B, vocabulary] from texts int[B, L] and float[B, vocabulary]."""
        best, token = torch.log_softmax(scores, -1).topk(self.num_tokens, dim=-1)
        count, width = token.shape
        text = input_ids.repeat_interleave(width, dim=0)
        text = torch.cat([text, token.reshape(-1, 1)], dim=1)
        mask = (text != self.pad).long()
        mask[:, -1] = 1
        place = (mask.cumsum(1) - 1).clamp(min=0)  # Prompts are padded on the left.
        logits = self.rewards(text, attention_mask=mask, position_ids=place).logits
        logits = logits.float().reshape(count, width, -1)
        weights = self.weights.to(logits.device).expand(count, logits.shape[-1])
        reward = torch.einsum("bwk,bk->bw", logits, weights).to(best.dtype)
        guided = torch.full_like(scores, float("-inf"))
        return guided.scatter(-1, token, best + self.strength * reward)
