"""Whether a Kubernetes cluster has what an overlay needs:  python -m deploy.check deploy/overlays/gpu-20

Run it in the repository's root, after `pip install kubernetes`, which brings quantities and YAML. It asks by kubectl,
for the context that is set, and starts one pod, which pulls the image, looks at the overlay's settings, and ends.
"""
