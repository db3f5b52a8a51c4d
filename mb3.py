import torch, time
torch.set_num_threads(1)
def t(f,n=10):
    f(); s=time.thread_time()
    for _ in range(n): f()
    return (time.thread_time()-s)/n*1e3
F=torch.nn.functional
with torch.inference_mode():
    q=torch.randn(1,9,512,64).bfloat16();k=torch.randn(1,9,512,64).bfloat16();v=torch.randn(1,9,512,64).bfloat16()
    print('sdpa causal',t(lambda:F.scaled_dot_product_attention(q,k,v,is_causal=True)))
    print('sdpa full',t(lambda:F.scaled_dot_product_attention(q,k,v)))
    m=torch.tril(torch.ones(512,512,dtype=torch.bool))[None,None]
    print('sdpa mask',t(lambda:F.scaled_dot_product_attention(q,k,v,attn_mask=m)))
    qf,kf,vf=q.float(),k.float(),v.float()
    print('sdpa f32',t(lambda:F.scaled_dot_product_attention(qf,kf,vf,is_causal=True)))
    def man():
        s=(q@k.transpose(-1,-2))
        p=torch.softmax(s,-1)
        return p@v
    print('manual bf16',t(man), 'qk',t(lambda:q@k.transpose(-1,-2)), 'softmax', t(lambda: torch.softmax(q@k.transpose(-1,-2),-1)))
    x=torch.randn(8192,1536).bfloat16(); y=torch.randn(8192,1536).bfloat16()
    print('sub f32', t(lambda:(y.float()-x.float()).to(torch.bfloat16),3), 'sub bf16', t(lambda: y-x,3), torch.equal((y.float()-x.float()).to(torch.bfloat16), y-x))
    a=y-x
    for T in (512,768,1536):
        print('cross',T,t(lambda:[a[:,i:i+T].T@x for i in range(0,1536,T)],2))
