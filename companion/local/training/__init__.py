"""LoRA fine-tuning (Hu et al. 2021, https://arxiv.org/abs/2106.09685) of the course's chat model, in a
process of its own: `python -m companion.local.training FOLDER`.

    examples   chat examples as tokens, with the weight of each in the loss
    model      the base model and its adapter: the forward pass, the loss and its gradient
    adapter    the trained adapter as files: PEFT's, llama.cpp's, merged into the base model
    run        a job: steps, evaluation, checkpoints, events, and going on after a stop

It knows one architecture, that of the GGUF files in `companion.local.weights` (Llama), and one method,
supervised. What a job is to its user is `companion.local.jobs`' affair.
"""
