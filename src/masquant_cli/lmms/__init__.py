"""lmms-eval's tasks on our models, and our models in lmms-eval. Needs `pip install masquant[lmms]`.

messages.py turns what a task shows into chat messages, answers.py has the model answer them,
wrapper.py is the model class that lmms-eval knows, backend.py runs its tasks. `manifest` is the
entry point by which `lmms-eval --model masquant` finds us. Only the last two import lmms-eval.
"""


def manifest():
    """lmms-eval's description of our two model classes."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="masquant",
        simple_class_path="masquant_cli.lmms.wrapper.Masquant",
        chat_class_path="masquant_cli.lmms.wrapper.MasquantChat",
    )
