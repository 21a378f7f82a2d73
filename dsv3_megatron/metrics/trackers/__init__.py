"""Programs beside TensorBoard that a run gives the same tags to: Weights & Biases, MLflow, Prometheus.

None of them is installed with this library. Begin at `kinds.py`.

    kinds.py            which there are: setting, package, tracker
    tracked_values.py   what a tracker gets of a moment
    tracker_thread.py   a tracker that no run waits for, nor ends with
    wandb_runs.py       Weights & Biases    mlflow_runs.py  MLflow
    prometheus_file.py  a file for Prometheus' node exporter
"""
