(()=>{const t=document.getElementById('rows');if(!t)return;const b=t.tBodies[0];
const rows=[...b.rows],first=rows.slice();
const value=(r,i)=>{const s=r.cells[i].textContent.replace(/[\u202f\u00a0%]/g,'')
.replace('\u2212','-');
const n=parseFloat(s);return Number.isNaN(n)?s:n};
[...t.tHead.rows[0].cells].forEach((h,i)=>{const k=document.createElement('button');
k.type='button';k.textContent=h.textContent;h.textContent='';h.append(k);
k.onclick=()=>{const up=h.ariaSort==='descending';const was=h.ariaSort==='ascending';
for(const c of t.tHead.rows[0].cells)c.removeAttribute('aria-sort');
if(was){b.append(...first);return}
h.setAttribute('aria-sort',up?'ascending':'descending');const s=up?1:-1;
b.append(...rows.sort((x,y)=>{const p=value(x,i),q=value(y,i);
return typeof p===typeof q?(p<q?-s:p>q?s:0):typeof p==='number'?-1:1}))}});
if(rows.length<=10)return;
const f=document.createElement('input');f.type='search';f.className='filter';
f.placeholder='Filter rows';f.setAttribute('aria-label','Filter rows');
f.oninput=()=>{const w=f.value.toLowerCase().split(/\s+/);
for(const r of rows)r.hidden=!w.every(x=>r.textContent.toLowerCase().includes(x))};
t.parentElement.before(f)})();
