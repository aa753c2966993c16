(()=>{const p=document.getElementById('reload');
const c=document.createElement('input');c.type='checkbox';c.checked=true;
const l=document.createElement('label');l.append(c,' load it again every 20 seconds');p.append(' ',l);
setInterval(()=>{if(c.checked)location.reload()},20000)})();
