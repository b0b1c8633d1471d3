# placeholder
import json
from qwentune.data.files import read_rows
from qwentune.data.sample import *
def read_samples(path, format, problems):
    for source, row in read_rows(path, problems):
        ms=[]
        for m in row["messages"]:
            m=dict(m); r=None
            for k in ("reasoning_content","reasoning","thinking"):
                v=m.pop(k,None); r = v if v is not None else r
            calls=[]
            for c in m.pop("tool_calls",None) or []:
                f=c.get("function",c); a=f["arguments"]; a=json.loads(a) if isinstance(a,str) else a
                calls.append(ToolCall(f["name"],a,{k:v for k,v in c.items() if k not in("function","type")}))
            content=m.pop("content",None)
            if content is None: content=""
            if isinstance(content,list): content="".join(p["text"] for p in content)
            role={"developer":"system","function":"tool"}.get(m["role"],m["role"]); m.pop("role")
            w=m.pop("weight",1.0); 
            if m.pop("train",True) is False: w=0.0
            ms.append(Message(role,content,r,tuple(calls),float(w),{k:v for k,v in m.items() if v is not None}))
        tools=row.get("tools") or []
        if isinstance(tools,str): tools=json.loads(tools)
        yield Conversation(source,tuple(ms),tuple(tools))
