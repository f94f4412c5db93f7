"""AccVideo's ComfyUI nodes, a module per capability. The table here is what the pack registers."""

from .decode import AccVideoVAEDecode
from .loaders import AccVideoStudentLoader, AccVideoTinyModels
from .lora import AccVideoLoraApply, AccVideoLoraExtract, AccVideoLoraMerge, AccVideoLoraStack
from .prompts import AccVideoPlanWriter, AccVideoPrompts
from .sampling import AccVideoSampler, AccVideoSigmas
from .synvid import AccVideoSynVidInspect, AccVideoSynVidWriter, AccVideoTrajectorySampler
from .video import AccVideoCompare

# Node classes by id and display name. Written out, because asking the schemas would list every model folder at start.
NODES = {
    "AccVideoStudentLoader": (AccVideoStudentLoader, "AccVideo Student Loader"),
    "AccVideoTinyModels": (AccVideoTinyModels, "AccVideo Tiny Models"),
    "AccVideoLoraStack": (AccVideoLoraStack, "AccVideo LoRA Stack"),
    "AccVideoLoraApply": (AccVideoLoraApply, "AccVideo LoRA Apply"),
    "AccVideoLoraMerge": (AccVideoLoraMerge, "AccVideo LoRA Merge"),
    "AccVideoLoraExtract": (AccVideoLoraExtract, "AccVideo LoRA Extract"),
    "AccVideoSampler": (AccVideoSampler, "AccVideo Sampler"),
    "AccVideoSigmas": (AccVideoSigmas, "AccVideo Sigmas"),
    "AccVideoVAEDecode": (AccVideoVAEDecode, "AccVideo VAE Decode"),
    "AccVideoCompare": (AccVideoCompare, "AccVideo Compare"),
    "AccVideoTrajectorySampler": (AccVideoTrajectorySampler, "AccVideo Trajectory Sampler"),
    "AccVideoSynVidWriter": (AccVideoSynVidWriter, "AccVideo SynVid Writer"),
    "AccVideoSynVidInspect": (AccVideoSynVidInspect, "AccVideo SynVid Inspect"),
    "AccVideoPrompts": (AccVideoPrompts, "AccVideo Prompts"),
    "AccVideoPlanWriter": (AccVideoPlanWriter, "AccVideo Plan Writer"),
}
