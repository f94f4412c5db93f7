"""Nodes for the tests only: a MODEL that counts and delays its network calls, a latent's preview, random text, image features,
and two faults: no memory, no room on the disk."""

import errno
import os
import time

import comfy.clip_vision
import latent_preview
import numpy as np
import torch


class AccVideoTestWatch:
    """Every call of the network appends a line to a file, then sleeps."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "log": ("STRING", {}), "seconds": ("FLOAT", {"default": 0.0})}}

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "watch"
    CATEGORY = "AccVideo test"

    def watch(self, model, log, seconds):
        def wrapper(apply_model, arguments):
            with open(log, "a") as file:
                file.write(f"{float(arguments['timestep'][0])} {tuple(arguments['input'].shape)}\n")
            time.sleep(seconds)
            return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

        model = model.clone()
        model.set_model_unet_function_wrapper(wrapper)
        return (model,)


class AccVideoTestPreview:
    """The picture ComfyUI shows while this MODEL samples, of a given latent, one pixel per latent place."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "latent": ("LATENT",)}}

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "preview"
    CATEGORY = "AccVideo test"

    def preview(self, model, latent):
        previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
        picture = previewer.decode_latent_to_preview(model.model.process_latent_in(latent["samples"]))
        return (torch.from_numpy(np.asarray(picture)).float()[None] / 255,)


class AccVideoTestText:
    """CONDITIONING of random text, for models whose text encoder is too large for a test."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"width": ("INT", {"max": 8192})}, "optional": {"seed": ("INT", {"default": 0})}}

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "AccVideo test"

    def make(self, width, seed=0):
        return ([[torch.randn(1, 7, width, generator=torch.Generator().manual_seed(seed)), {}]],)


class AccVideoTestImageFeatures:
    """CLIP_VISION_OUTPUT of random features, as the CLIP vision model of Wan's image-to-video gives them."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    RETURN_TYPES = ("CLIP_VISION_OUTPUT",)
    FUNCTION = "make"
    CATEGORY = "AccVideo test"

    def make(self):
        features = comfy.clip_vision.Output()
        features["penultimate_hidden_states"] = torch.randn(1, 257, 1280, generator=torch.Generator().manual_seed(0))
        return (features,)


class AccVideoTestOutOfMemory:
    """A MODEL whose network asks for more memory than there is."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",)}}

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "AccVideo test"

    def patch(self, model):
        def wrapper(apply_model, arguments):
            raise torch.cuda.OutOfMemoryError("Allocation on device would exceed allowed memory.")

        model = model.clone()
        model.set_model_unet_function_wrapper(wrapper)
        return (model,)


class AccVideoTestDiskFull:
    """Hands a text on; the next file that is flushed meets a full disk, as delayed allocation shows it."""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"text": ("STRING", {})}}

    RETURN_TYPES = ("STRING",)
    FUNCTION = "arm"
    CATEGORY = "AccVideo test"

    def arm(self, text):
        real = os.fsync

        def full(handle):
            os.fsync = real
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        os.fsync = full
        return (text,)


_NODES = (
    AccVideoTestWatch,
    AccVideoTestPreview,
    AccVideoTestText,
    AccVideoTestImageFeatures,
    AccVideoTestOutOfMemory,
    AccVideoTestDiskFull,
)
NODE_CLASS_MAPPINGS = {node.__name__: node for node in _NODES}
