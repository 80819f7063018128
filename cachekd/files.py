"""Names of files by which a cache or a run is known, and of what else a run's folder holds."""

MANIFEST_FILE = "manifest.json"  # a cache's, written last
RUN_FILE = "cachekd_run.json"  # configuration, versions, cache manifest, log
SCORES_FILE = "scores.json"  # of an evaluation, all rows
EVALUATIONS_FOLDER = "evaluations"  # scores of the run, a file for each set of questions
REPORT_FILE = "report.html"
BRIDGE_FILE = "switch_bridge.safetensors"
ADAPTER_FOLDER = "adapter"  # in a run that trained adapters
