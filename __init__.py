"""What ComfyUI imports when this repository lies in its custom_nodes folder: the node mappings and the web folder.

Outside ComfyUI (a test runner that looks into every package, a pip install) nothing is imported and nothing registered.
"""

from importlib.util import find_spec

NODE_CLASS_MAPPINGS: dict[str, type] = {}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {}
WEB_DIRECTORY = "./web"

if find_spec("comfy") is not None and find_spec("folder_paths") is not None:
    if find_spec("comfy_api") is None or find_spec("comfy_api.latest") is None:
        raise ImportError("AccVideo needs ComfyUI 0.3.64 or newer; update ComfyUI")
    from .nodes import NODES

    NODE_CLASS_MAPPINGS |= {node_id: node for node_id, (node, _) in NODES.items()}
    NODE_DISPLAY_NAME_MAPPINGS |= {node_id: name for node_id, (_, name) in NODES.items()}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
