"""Jobs that any number of workers share, in processes of their own: what tables are filled by.

queue.py      a folder of jobs, each done once, whoever dies
identity.py   what a job's result depends on, and the address that says it
process.py    what the process of a job does whatever the job is
cluster.py    workers through submitit
"""
