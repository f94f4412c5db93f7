"""Nodes for the tests only: a MODEL that counts and delays its network calls."""

import time


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


NODE_CLASS_MAPPINGS = {"AccVideoTestWatch": AccVideoTestWatch}
