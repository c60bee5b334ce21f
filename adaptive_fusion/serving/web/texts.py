"""Every text of the pages, in each language: one table.

Knows words. Must not know where they stand.
"""

import re
from collections.abc import Mapping

LANGUAGES: Mapping[str, str] = {"en": "en", "zh": "zh-Hans"}
"""Names in paths, and the tags of BCP 47 that pages say."""

TEXTS: Mapping[str, tuple[str, str]] = {
    # the page
    "title": ("adaptive_fusion", "adaptive_fusion"),
    "language": ("English", "中文"),
    "language_label": ("Language", "语言"),
    "leave": ("Forget the key", "清除密钥"),
    "key": ("API key", "API 密钥"),
    "key_why": (
        "This server needs a key. It is kept for this browser session only.",
        "此服务器需要密钥。密钥只在本次浏览器会话中保留。",
    ),
    "key_enter": ("Enter", "进入"),
    "key_wrong": ("The server does not know this key.", "服务器不认识此密钥。"),
    "tab_chat": ("Chat", "对话"),
    "tab_compare": ("Compare", "对比"),
    "tab_live": ("Live", "实时"),
    "tab_folder": ("Explain a folder", "解释文件夹"),
    "tab_rollout": ("Rollout", "发布"),
    # chat
    "conversation": ("Conversation", "对话内容"),
    "no_answer_yet": ("Show an image or a clip and ask about it.", "上传图片或视频并提问。"),
    "message": ("Message, images and clips", "消息、图片和视频"),
    "message_hint": ("Ask; paste or drop images here", "输入问题；可粘贴或拖入图片"),
    "send": ("Send", "发送"),
    "stop": ("Stop", "停止"),
    "clear": ("New conversation", "新对话"),
    "export": ("Export conversation", "导出对话"),
    "settings": ("Prompt and sampling", "提示词与采样"),
    "system": ("System prompt", "系统提示词"),
    "max_tokens": ("Most tokens of an answer", "回答的最大 token 数"),
    "temperature": ("Temperature (0 is greedy)", "温度（0 为贪心）"),
    "top_p": ("Top-p", "Top-p"),
    "model": ("Model", "模型"),
    "no_model": ("The server names no model.", "服务器没有列出任何模型。"),
    "seed": ("Seed (empty draws one)", "随机种子（留空则随机）"),
    "thumbs_up": ("Good answer", "回答好"),
    "thumbs_down": ("Bad answer", "回答差"),
    "rated": ("Thank you: the rating is in the log.", "谢谢：评价已写入日志。"),
    "rated_before": ("This rating was there already.", "此评价已存在。"),
    "nothing_to_rate": ("There is no answer to rate yet.", "还没有可评价的回答。"),
    "stopped": ("stopped", "已停止"),
    "failed": ("The request failed", "请求失败"),
    "nothing_asked": ("Write a question first.", "请先输入问题。"),
    "busy": ("An answer is still being written; stop it first.", "回答尚未结束；请先停止。"),
    "wrong_file": ("{name} is neither an image nor a clip.", "{name} 既不是图片也不是视频。"),
    "file_gone": ("A file is not here any more; upload it again.", "文件已不存在；请重新上传。"),
    "session_over": ("The session has ended; load the page again.", "会话已结束；请重新加载页面。"),
    # budget
    "budget": ("Budget", "预算"),
    "latency_ms": ("Latency limit in ms (0: the server's)", "延迟上限，毫秒（0：服务器设置）"),
    "ttft_ms": ("Limit for the first token in ms (0: the server's)", "首个 token 上限，毫秒（0：服务器设置）"),
    "vram_gb": ("Memory limit in GiB (0: the server's)", "显存上限，GiB（0：服务器设置）"),
    "attainment": ("Share of requests to be in time", "按时完成的比例"),
    "on_deadline": ("At the deadline", "到达期限时"),
    "on_deadline_finish": ("finish the answer", "完成回答"),
    "on_deadline_stop": ("cut the answer off", "截断回答"),
    "on_infeasible": ("If nothing fits", "没有方案可行时"),
    "on_infeasible_cheapest": ("run the cheapest", "用最省的方案"),
    "on_infeasible_refuse": ("refuse", "拒绝"),
    "policy": ("Policy", "策略"),
    "policy_default": ("the server's own", "服务器默认"),
    "points": ("Points on offer with this budget", "此预算下的候选方案"),
    "plan": ("Plan", "方案"),
    "quality": ("Expected quality", "预期质量"),
    "verdict": ("Verdict", "结论"),
    "taken": ("taken", "选用"),
    "not_taken": ("not taken", "未选用"),
    # decision
    "decision": ("Decision", "决策"),
    "answer_number": ("Decision of answer", "查看哪个回答的决策"),
    "no_decision": ("Decisions appear here with the first answer.", "有回答后在此显示决策。"),
    "lane": ("Lane", "通道"),
    "p_complex": ("P(complex)", "P(复杂)"),
    "complexity": ("Complexity", "复杂度"),
    "media": ("Each image or clip", "各图片或视频"),
    "why": ("Why", "原因"),
    "predicted": ("Predicted", "预测"),
    "actual": ("Actual", "实际"),
    "escalated": ("Escalated", "升级重算"),
    "tokens_saved": ("Visual tokens saved", "节省的视觉 token"),
    "of_native": ("of {native}", "共 {native}"),
    "met": ("Within budget", "在预算内"),
    "yes": ("yes", "是"),
    "no": ("no", "否"),
    "none": ("none", "无"),
    "picture": ("The image, small", "图片（缩小）"),
    "edges": ("Edges as measured", "测得的边缘"),
    "features": ("Features against the policy's range", "特征与策略范围"),
    "range_note": (
        "The band is the range that the policy knows; a bar beyond it is marked.",
        "色带为策略已知的范围；超出者有标记。",
    ),
    "feature": ("Feature", "特征"),
    "value": ("Value", "数值"),
    "range": ("Range", "范围"),
    "outside": ("outside", "超出"),
    "rejected": ("Points not taken", "未选用的方案"),
    "reason": ("Reason", "原因"),
    "as_json": ("As JSON", "JSON"),
    "copy": ("Copy", "复制"),
    "ms": ("ms", "毫秒"),
    "queue": ("Queue", "排队"),
    "ttft": ("First token", "首个 token"),
    "latency": ("Latency", "延迟"),
    "memory": ("Peak memory", "内存峰值"),
    "tokens": ("Visual tokens", "视觉 token"),
    "new_tokens": ("New tokens", "生成的 token"),
    # compare
    "compare_why": (
        "The same question natively and adaptively, with the budget and the settings of the chat page.",
        "同一问题分别用原生和自适应方式回答，使用对话页的预算和设置。",
    ),
    "files": ("Images and clips", "图片和视频"),
    "in_turn": ("one after the other", "依次"),
    "at_once": ("both at once", "同时"),
    "order": ("Order", "顺序"),
    "run": ("Compare", "对比"),
    "native": ("Native", "原生"),
    "adaptive": ("Adaptive", "自适应"),
    "differences": ("Differences", "差异"),
    "differences_none": ("The answers are the same.", "两个回答相同。"),
    "only_native": ("only native", "仅原生"),
    "only_adaptive": ("only adaptive", "仅自适应"),
    "waiting": ("waiting…", "等待中…"),
    # live
    "live_why": (
        "The last answers of the server. What was asked and answered is not kept and not shown.",
        "服务器最近的回答。问题与回答的内容不保存也不显示。",
    ),
    "refresh": ("Refresh now", "立即刷新"),
    "follow": ("Refresh every 2 seconds", "每 2 秒刷新"),
    "latency_over_time": ("Latency against budget, last answers", "延迟与预算（最近的回答）"),
    "limit": ("budget", "预算"),
    "lanes": ("Lanes", "通道"),
    "plans": ("Plans", "方案"),
    "attained": ("In time", "按时"),
    "target": ("target {target}", "目标 {target}"),
    "price": ("Price of a miss", "超时的代价"),
    "cache_hits": ("Encoder cache hits", "编码器缓存命中"),
    "running": ("Running", "运行中"),
    "waiting_count": ("Waiting", "等待中"),
    "resident": ("Memory of the process", "进程内存"),
    "vram_peak": ("Highest peak of the last answers", "最近回答的内存峰值"),
    "requests": ("Last requests", "最近的请求"),
    "time": ("Time", "时间"),
    "request": ("Request", "请求"),
    "open_request": ("Open the decision of request", "打开请求的决策"),
    "no_requests": ("No request was answered yet.", "还没有已回答的请求。"),
    # folder
    "folder_why": (
        "Drop images: each is measured and decided, nothing is generated. The budget is the chat page's.",
        "拖入图片：逐一测量并决策，不生成回答。预算取自对话页。",
    ),
    "folder_prompt": ("Question that would be asked (may be empty)", "假设的问题（可留空）"),
    "explain": ("Explain", "解释"),
    "sort": ("Sort by", "排序"),
    "sort_name": ("name", "名称"),
    "sort_p": ("P(complex), highest first", "P(复杂)，从高到低"),
    "sort_tokens": ("visual tokens, most first", "视觉 token，从多到少"),
    "gallery": ("Gallery", "图库"),
    "no_files": ("Choose images first.", "请先选择图片。"),
    "explained_count": ("{done} of {all} files", "{done} / {all} 个文件"),
    # rollout
    "rollout_none": ("This server runs no experiments.", "此服务器没有实验。"),
    "rollout_confirm": ("I mean it", "我确认"),
    "rollout_unconfirmed": ("Tick the box first.", "请先勾选确认。"),
    "promote": ("Promote", "推进"),
    "abort": ("Abort", "中止"),
    "experiment": ("Experiment", "实验"),
    "arms": ("Arms", "分组"),
    "metrics": ("Metrics", "指标"),
    "history": ("History", "历史"),
    "status": ("Status", "状态"),
    "step": ("Step", "步骤"),
    "share": ("Share", "比例"),
    "who": ("Who", "操作者"),
    "arm": ("Arm", "分组"),
    "requests_count": ("Requests", "请求数"),
    "metric": ("Metric", "指标"),
    "margin": ("Margin", "容许差"),
    "evidence": ("Evidence, and what takes it back", "证据与回滚阈值"),
    "low": ("lower end", "下限"),
    "high": ("upper end", "上限"),
    "done": ("Done.", "完成。"),
}


def text(key: str, language: str, **values: object) -> str:
    """The text called `key`, with `values` put in."""
    found = TEXTS[key][list(LANGUAGES).index(language)]
    return found.format(**values) if values else found


def preferred(header: str) -> str:
    """The language that ``Accept-Language`` likes best of ours; English where it likes none."""
    liked: list[tuple[float, str]] = []
    for part in header[:1000].split(","):
        tag, _, weight = part.partition(";")
        found = re.fullmatch(r"\s*q=([01](?:\.\d{0,3})?)\s*", weight)
        name = tag.strip().lower().partition("-")[0]
        if name in LANGUAGES:
            liked.append((float(found[1]) if found else 1.0, name))
    best = max(liked, key=lambda pair: pair[0], default=(0.0, "en"))
    return best[1] if best[0] > 0 else "en"
