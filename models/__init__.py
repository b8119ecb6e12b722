"""The families of models, token heads, tokenizers, and how they compute."""

import torch

# On Hopper chips PyTorch prefers cuDNN's attention, which builds a plan for each new shape, forwards and backwards:
# training has another number of known tokens at every step, sampling at every step of a batch.
torch.backends.cuda.enable_cudnn_sdp(False)
