"""One container for all jobs, where DINOSCOPE_CONTAINER names it and --sdm apptainer is given."""

image = os.environ.get("DINOSCOPE_CONTAINER")

if image:

    container: image
