"""One container for all jobs, where DINOSCOPE_CONTAINER names it and --sdm apptainer is given."""

if os.environ.get("DINOSCOPE_CONTAINER"):

    container: os.environ["DINOSCOPE_CONTAINER"]
