"""What papers say of DeepSeek-V3, figure by figure, and what this library gives for each: the page docs/report.md.

Nothing is imported here. Begin with the first; the claims are data, each with a function that computes our side.

    claim.py              a printed figure, its comparison, the verdict
    model_claims.py       widths, parameters, operations, cache        training_claims.py   the recipe
    schedule_claims.py    bubbles of the schedules                     fp8_claims.py        formats and scales
    cluster_claims.py     layout, dispatch, memory, time, cost         later_claims.py      post-training, results
    claim_table.py        all of them, in the page's order             claim_page.py        the page
    published_runs.py     training runs of others, predicted         published_failures.py   those with failures
"""
