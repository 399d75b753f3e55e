"""The page of a report, which loads nothing: its style is in it, and it has no script that runs."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Acceptance report: Qwen3 on MindSpore</title>
<style>
:root { --ink: #1c2024; --soft: #667; --line: #dde; --back: #f6f7f9; --good: #1a7f37; --bad: #c2201f; --none: #8a6d1a; }
* { box-sizing: border-box; }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); margin: 2em auto; max-width: 72em; padding: 0 1.5em; }
h1 { font-size: 1.5em; margin: 0 0 .4em; }
h2 { font-size: 1.15em; margin: 0 0 .2em; }
p { margin: .3em 0; }
section { border-top: 1px solid var(--line); padding: 1.1em 0; }
table { border-collapse: collapse; margin: .6em 0; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .3em .7em .3em 0; border-bottom: 1px solid var(--line); font-weight: normal; }
th { color: var(--soft); white-space: nowrap; }
th.number { padding-right: 0; }
table.plain { width: auto; }
table.plain td, table.plain th { border: 0; padding: .1em 1.2em .1em 0; }
table.checks { table-layout: fixed; }
col.mark { width: 9.3em; }
col.name { width: 19em; }
col.time { width: 5em; }
table.index td:first-child { width: 9.3em; }
table.index td:nth-child(2) { width: 8em; }
table.checks td { overflow-wrap: anywhere; }
table.checks tr.fail td { background: #fdf1f0; }
.title::first-letter { text-transform: uppercase; }
.number { text-align: right; white-space: nowrap; color: var(--soft); padding-right: 0; }
.result { font-size: 1.2em; font-weight: 600; padding: .5em .8em; border-radius: 6px; background: var(--back); }
.result.pass { color: var(--good); background: #e9f6ec; }
.result.fail { color: var(--bad); background: #fdecea; }
span.mark { display: inline-block; min-width: 3.2em; padding: .05em .5em; border-radius: 4px; font-size: .82em; text-align: center;
  color: #fff; background: var(--none); white-space: nowrap; }
span.mark.pass { background: var(--good); }
span.mark.fail { background: var(--bad); }
.fact { display: inline-block; margin-right: 1.1em; }
.fact b { font-weight: normal; color: var(--soft); }
pre, code { font: 13px/1.4 ui-monospace, monospace; background: var(--back); border-radius: 4px; }
pre { padding: .6em .8em; white-space: pre-wrap; overflow-wrap: anywhere; margin: .3em 0; }
code { padding: .1em .3em; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--soft); }
a { color: inherit; }
</style>
</head>
<body>
<h1>Acceptance report: Qwen3 on MindSpore</h1>
@HEAD@
@SUMMARY@
@STAGES@
<script type="application/json" id="facts">@DATA@</script>
</body>
</html>
"""
