"""The trainer's mathematics once more, from the papers and with nothing shared but the sample stream.

One sample at a time, in plain PyTorch and in float64, whose rounding is nothing beside the trainer's float32: no
accelerate, no optimizer class, no scheduler class, no EMA class.
"""

import math

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

BETA1, BETA2, EPSILON, DECAY, CLIP = 0.9, 0.999, 1e-8, 0.01, 1.0


def train(
    model, stream, *, batch, steps, rate, v=False, gamma=None, offset=0.0, perturbation=0.0, dream=None, clip=CLIP
):
    """Return (weights, EMA) by name after `steps` steps on `batch` samples each; `rate` maps a step to its rate."""
    vae, text_encoder, unet = (
        cls.from_pretrained(model / part).double().requires_grad_(part == "unet")
        for part, cls in (("vae", AutoencoderKL), ("text_encoder", CLIPTextModel), ("unet", UNet2DConditionModel))
    )
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bars = torch.cumprod(1 - betas, 0)
    names, theta = zip(*unet.named_parameters(), strict=True)
    m, u = ([torch.zeros_like(p) for p in theta] for _ in range(2))
    average = [p.detach().clone() for p in theta]

    for t in range(steps):
        gradient = [torch.zeros_like(p) for p in theta]
        for position in range(t * batch, (t + 1) * batch):
            s = {
                name: value.double() if value.is_floating_point() else value for name, value in stream[position].items()
            }
            a = alpha_bars[s["timesteps"]]
            timestep, signal, sigma = s["timesteps"][None], a.sqrt(), (1 - a).sqrt()
            with torch.no_grad():
                text = text_encoder(s["input_ids"][None]).last_hidden_state
                mean, log_variance = vae.quant_conv(vae.encoder(s["pixel_values"][None])).chunk(2, dim=1)
                x0 = 0.18215 * (mean + torch.exp(log_variance.clamp(-30, 20) / 2) * s["posterior_noise"])
            noise = s["noise"] + offset * s["noise_offset"]
            x = signal * x0 + sigma * (noise + (perturbation * s["input_perturbation"] if perturbation else 0))
            target = signal * noise - sigma * x0 if v else noise[None]
            if dream is not None:
                with torch.no_grad():
                    delta = sigma**dream * (noise - unet(x, timestep, text).sample)
                x, target = x + sigma * delta, target + delta
            loss = (unet(x, timestep, text).sample - target).square().mean()
            if gamma is not None:
                snr = (a / (1 - a)).item()
                loss = loss * (min(snr, gamma) / (snr + 1 if v else snr))
            for total, g in zip(gradient, torch.autograd.grad(loss, theta), strict=True):
                total += g / batch
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradient))
        decay = 0.0 if t == 0 else min(0.9999, (1 + t) / (10 + t))
        with torch.no_grad():
            for p, g, m_, u_, e in zip(theta, gradient, m, u, average, strict=True):
                g *= min(1.0, clip / norm)  # Pascanu et al. 2013, algorithm 1
                m_.copy_(BETA1 * m_ + (1 - BETA1) * g)  # Loshchilov & Hutter 2019, algorithm 2
                u_.copy_(BETA2 * u_ + (1 - BETA2) * g * g)
                m_hat, u_hat = m_ / (1 - BETA1 ** (t + 1)), u_ / (1 - BETA2 ** (t + 1))
                p -= rate(t) * (m_hat / (u_hat.sqrt() + EPSILON) + DECAY * p)
                e.copy_(decay * e + (1 - decay) * p)
    return {n: p.detach() for n, p in zip(names, theta, strict=True)}, dict(zip(names, average, strict=True))
