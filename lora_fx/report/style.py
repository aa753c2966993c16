"""How the page looks, and the script that sorts and filters its table.

Colours are pairs for light and dark; every text has a contrast of at least 4.5 to what is behind
it in both. Sizes are few: 13 px for text, 12 for cells, 20 for the verdict.
"""

from __future__ import annotations

_LEFT = ",".join(f".l{i} :is(th,td):nth-child({i})" for i in range(2, 18))
"""Columns of text, by the classes of the table: a class in every cell would be most of it."""

CSS = (
    """
:root{color-scheme:light dark;--paper:#fff;--soft:#f5f6f8;--line:#d9dde3;--ink:#1b2028;
--quiet:#545d6b;--good:#0a6b3d;--bad:#b3231c;--warn:#8a5300;--blue:#1f5fbf;--held:#b0480a;
--s0:#e8eff9;--s1:#c3d8f3;--s2:#8fb7e8;--s3:#2e6cc4;--s4:#153f80;--on0:#1b2028;--on4:#fff}
@media screen and (prefers-color-scheme:dark){:root{--paper:#12151a;--soft:#1a1e25;--line:#323945;
--ink:#e3e7ed;--quiet:#a3adbb;--good:#5fd39a;--bad:#ff8f85;--warn:#f0b95c;--blue:#7db0ff;
--held:#ffab70;--s0:#1d2733;--s1:#213a5c;--s2:#2a528a;--s3:#79aef0;--s4:#b9d6ff;--on0:#e9eef5;
--on4:#0d1117}}
*{box-sizing:border-box}
body{margin:0 auto;padding:20px clamp(12px,3vw,40px) 48px;max-width:1600px;background:var(--paper);
color:var(--ink);font:13px/1.5 system-ui,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
font-variant-numeric:tabular-nums;-webkit-text-size-adjust:100%}
h1,h2,h3,p,ul,dl,dd,figure,pre{margin:0;padding:0}
h1{font-size:20px;line-height:1.3;font-weight:600;letter-spacing:-.01em;text-wrap:balance;
overflow-wrap:anywhere}
h2{font-size:14px;font-weight:600;margin-bottom:8px}
h3{font-size:13px;font-weight:600;margin:10px 0 2px}
section{margin-top:28px}
code,pre,.targets tbody th{font-family:ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",
monospace;font-size:12px;unicode-bidi:isolate;overflow-wrap:anywhere}
.verdict{border-top:4px solid var(--good);padding-top:14px}
.verdict.no{border-color:var(--bad)}
.what{color:var(--quiet);margin-bottom:4px}
.badge{color:var(--good);margin-right:4px}
.no .badge{color:var(--bad)}
.hint{margin-top:6px;color:var(--quiet)}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,148px),1fr));gap:1px;
margin-top:14px;padding:1px;max-width:1180px}
.facts div{padding:8px 12px 9px;box-shadow:0 0 0 1px var(--line)}
.facts dt,.beside,.count,.versions dt{color:var(--quiet);font-size:12px}
.value{font-size:19px;line-height:1.35;font-weight:600;letter-spacing:-.01em}
.good .value,b.good{color:var(--good)}
.bad .value,b.bad{color:var(--bad)}
.warned li{border-left:3px solid var(--warn);padding-left:10px;margin:4px 0;overflow-wrap:anywhere}
ul{list-style:none}
li{overflow-wrap:anywhere}
li span{color:var(--quiet)}
figcaption{color:var(--quiet);margin-bottom:8px}
.legend{white-space:nowrap}
.legend i{display:inline-block;width:14px;height:10px;margin:0 1px}
.legend i.train,.legend i.held{height:2px;width:18px;margin:0 4px 4px 8px;background:var(--blue)}
.legend i.held{background:var(--held)}
.boxes{display:flex;flex-wrap:wrap;align-items:flex-start;gap:8px}
.box{border:1px solid var(--line);padding:6px 8px 8px;max-width:100%;break-inside:avoid}
.box p{font-size:12px;line-height:1.35;margin-bottom:5px;overflow-wrap:anywhere;
unicode-bidi:isolate}
.box span{color:var(--quiet);white-space:nowrap}
.box b{font-weight:600}
svg{display:block;max-width:100%}
.box text{font-size:10px;text-anchor:middle;fill:var(--on0)}
.box text+text{font-size:11px;font-weight:600}
.box .s3 text,.box .s4 text{fill:var(--on4)}
.s0{fill:var(--s0)}i.s0{background:var(--s0)}.s1{fill:var(--s1)}i.s1{background:var(--s1)}
.s2{fill:var(--s2)}i.s2{background:var(--s2)}.s3{fill:var(--s3)}i.s3{background:var(--s3)}
.s4{fill:var(--s4)}i.s4{background:var(--s4)}
.plot{position:relative;height:clamp(180px,26vw,300px);margin:10px 12px 26px 46px}
.plot svg{width:100%;height:100%;overflow:visible}
.plot path{fill:none;vector-effect:non-scaling-stroke}
.grid{stroke:var(--line);stroke-width:1}
.line{stroke:var(--blue);stroke-width:1.5;stroke-linejoin:round}
.held.line{stroke:var(--held)}
.dots{stroke:var(--held);stroke-width:6;stroke-linecap:round}
.kept{stroke:var(--ink);stroke-width:1;stroke-dasharray:3 3}
.plot span{position:absolute;font-size:12px;color:var(--quiet);white-space:nowrap}
.left span{right:calc(100% + 8px);transform:translateY(-50%)}
.below span{top:calc(100% + 5px);transform:translateX(-50%)}
.plot .mark{top:2px;margin:0 6px;padding:0 3px;color:var(--ink);background:var(--paper)}
.bars{width:100%;height:90px;border-bottom:1px solid var(--line)}
.bars path{stroke:var(--held)}
.across{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:12px;line-height:1.4}
.targets th,.targets td{padding-right:18px}
.small{min-width:min(100%,320px)}
th,td{padding:4px 10px 4px 0;text-align:right;white-space:nowrap;vertical-align:middle;
border-bottom:1px solid var(--line)}
thead th{font-weight:600;color:var(--quiet);vertical-align:bottom;border-bottom-color:var(--quiet)}
.t,.targets th:first-child{text-align:left}
.targets tbody th{font-weight:400;white-space:normal;min-width:150px;overflow-wrap:break-word}
.targets td:last-child,.small .t{white-space:normal}
.targets th:first-child{position:sticky;left:0;background:var(--paper)}
.targets tbody tr:hover,.targets tbody tr:hover th{background:var(--soft)}
.targets svg{height:22px}
.across+.count{margin-top:6px}
td svg path{stroke:var(--blue);stroke-width:4}
td .p3 path{stroke-width:2}
.gauge path{stroke:var(--good);stroke-width:6}
.gauge .all{stroke:var(--line)}
.gauge.bad path{stroke:var(--bad)}
.steps{display:flex;flex-wrap:wrap;gap:2px 22px;margin-top:8px}
.steps b{font-weight:600}
pre{white-space:pre-wrap;background:var(--soft);padding:10px 12px}
.versions{display:flex;flex-wrap:wrap;gap:4px 24px;margin-top:10px}
.versions dt,.versions dd{display:inline;margin-right:6px}
thead button{all:unset;cursor:pointer;color:inherit}
:focus-visible{outline:2px solid var(--blue)!important;outline-offset:2px}
.filter{font:inherit;font-size:12px;color:var(--ink);background:var(--paper);width:min(100%,280px);
border:1px solid var(--quiet);padding:4px 8px;margin:6px 0}
.filter::placeholder{color:var(--quiet);opacity:1}
@media(max-width:600px){.targets tbody th{min-width:118px;max-width:44vw}th,td{padding-right:8px}}
@media print{body{padding:0;max-width:none;font-size:10pt}
.across{overflow:visible}.filter{display:none}thead{display:table-header-group}
tr,figure.curve,.facts{break-inside:avoid}h2{break-after:avoid}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
    + f"{_LEFT}{{text-align:left}}"
)

SCRIPT = """
(()=>{const t=document.getElementById('rows');if(!t)return;const b=t.tBodies[0];
const rows=[...b.rows],first=rows.slice();
const value=(r,i)=>{const s=r.cells[i].textContent.replace(/[\\u202f\\u00a0%]/g,'')
.replace('\\u2212','-');
const n=parseFloat(s);return Number.isNaN(n)?s:n};
[...t.tHead.rows[0].cells].forEach((h,i)=>{const k=document.createElement('button');
k.type='button';k.textContent=h.textContent;h.textContent='';h.append(k);
k.onclick=()=>{const up=h.ariaSort==='descending';const was=h.ariaSort==='ascending';
for(const c of t.tHead.rows[0].cells)c.removeAttribute('aria-sort');
if(was){b.append(...first);return}
h.setAttribute('aria-sort',up?'ascending':'descending');const s=up?1:-1;
b.append(...rows.sort((x,y)=>{const p=value(x,i),q=value(y,i);
return typeof p===typeof q?(p<q?-s:p>q?s:0):typeof p==='number'?-1:1}))}});
const f=document.createElement('input');f.type='search';f.className='filter';
f.placeholder='Filter targets';f.setAttribute('aria-label','Filter targets');
f.oninput=()=>{const w=f.value.toLowerCase().split(/\\s+/);
for(const r of rows)r.hidden=!w.every(x=>r.textContent.toLowerCase().includes(x))};
t.parentElement.before(f)})();
"""
